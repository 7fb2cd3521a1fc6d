"""The losses on sharded logits, against one process: values, statistics and gradients, over real gloo processes."""

import json
import time

import pytest
import torch
from parallel_ranks import SHAPES, cases, main

LIMIT = 150  # seconds; a deadlock ends here


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """What went wrong on any rank, by shape and case; all shapes and cases in one set of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = max(a * b for a, b in SHAPES)
    processes = torch.multiprocessing.spawn(main, (str(folder),), nprocs=ranks, join=False)
    end = time.monotonic() + LIMIT
    while not processes.join(timeout=1):
        if time.monotonic() > end:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"the ranks did not finish within {LIMIT} s")
    reports = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {name: f"rank {rank}: {error}" for rank, report in enumerate(reports) for name, error in report.items()}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_sharded_equals_whole(case, shape, failures):
    name = f"{shape[0]}x{shape[1]} {case.name}"
    assert name not in failures, failures[name]
