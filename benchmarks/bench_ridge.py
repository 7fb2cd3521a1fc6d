"""The cases of `benchmarks/ops/ridge.py` under pytest-benchmark."""

from benchmarks.pytest_entry import entry

test_ridge = entry("ridge")
