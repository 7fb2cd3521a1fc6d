"""Fits over 2 and 4 real gloo processes equal those of one, with ranks that have no rows and targets spread over ranks."""

import json
import time

import pytest
import torch
from estimator_ranks import WORLDS, checks, main

LIMIT = 150  # seconds; a deadlock ends here


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """What went wrong on any rank, by number of ranks and check; all in one set of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = torch.multiprocessing.spawn(main, (str(folder),), nprocs=max(WORLDS), join=False)
    end = time.monotonic() + LIMIT
    while not processes.join(timeout=1):
        if time.monotonic() > end:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"the ranks did not finish within {LIMIT} s")
    reports = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(max(WORLDS))]
    return {name: f"rank {rank}: {error}" for rank, report in enumerate(reports) for name, error in report.items()}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", checks())
def test_ranks_equal_one_process(name, world, failures):
    name = f"{world} {name}"
    assert name not in failures, failures[name]
