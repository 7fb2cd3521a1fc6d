"""The cases of `benchmarks/ops/moments.py` under pytest-benchmark."""

from benchmarks.pytest_entry import entry

test_moments = entry("moments")
