"""The registry's cases as pytest-benchmark tests, for its statistics and comparisons: `pytest benchmarks/bench_moments.py`.

CHASSIS_BENCH_LEVEL picks the sizes (cases.LEVELS). The gate is the harness's; compare medians within a group.
"""

import os
from collections.abc import Callable

import pytest
import torch

from benchmarks.cases import cases
from benchmarks.measure import gate


def entry(op: str) -> Callable:
    """A test function for every case and provider of `op`, torch.compile left out."""
    pytest.importorskip("pytest_benchmark")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = cases(op, os.environ.get("CHASSIS_BENCH_LEVEL", "default"))
    pairs = [(case, name) for case in found for name in case.providers if name != "compile"]

    @pytest.mark.parametrize(("case", "name"), pairs, ids=[f"{name} {case.label} {case.dtype}" for case, name in pairs])
    def test_one_step(benchmark, case, name):
        benchmark.group = f"{op} {case.label} {case.dtype}"
        inputs = case.make(device)
        *_, failures = gate(case, ["eager", name], inputs)
        assert not failures
        step = case.providers[name].prepare(*inputs)

        def run():
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(run, warmup_rounds=1, rounds=7)

    return test_one_step
