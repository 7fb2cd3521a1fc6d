"""The cases of `benchmarks/ops/bridge_project.py` under pytest-benchmark."""

from benchmarks.pytest_entry import entry

test_bridge_project = entry("bridge_project")
