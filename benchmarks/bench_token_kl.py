"""The cases of `benchmarks/ops/token_kl.py` under pytest-benchmark."""

from benchmarks.pytest_entry import entry

test_token_kl = entry("token_kl")
