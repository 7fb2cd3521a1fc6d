"""The cases of `benchmarks/ops/projection_kl.py` under pytest-benchmark."""

from benchmarks.pytest_entry import entry

test_projection_kl = entry("projection_kl")
