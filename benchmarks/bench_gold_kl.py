"""The cases of `benchmarks/ops/gold_kl.py` under pytest-benchmark."""

from benchmarks.pytest_entry import entry

test_gold_kl = entry("gold_kl")
