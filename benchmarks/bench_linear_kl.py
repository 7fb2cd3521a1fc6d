"""The cases of `benchmarks/ops/linear_kl.py` under pytest-benchmark."""

from benchmarks.pytest_entry import entry

test_linear_kl = entry("linear_kl")
