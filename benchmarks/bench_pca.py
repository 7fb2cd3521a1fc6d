"""The cases of `benchmarks/ops/pca.py` under pytest-benchmark."""

from benchmarks.pytest_entry import entry

test_pca = entry("pca")
