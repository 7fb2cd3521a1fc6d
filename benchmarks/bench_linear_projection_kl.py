"""The cases of `benchmarks/ops/linear_projection_kl.py` under pytest-benchmark."""

from benchmarks.pytest_entry import entry

test_linear_projection_kl = entry("linear_projection_kl")
