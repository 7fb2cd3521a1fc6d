"""The cases of `benchmarks/ops/ridge_cv.py` under pytest-benchmark."""

from benchmarks.pytest_entry import entry

test_ridge_cv = entry("ridge_cv")
