"""Ridge under torchrun, in two processes over gloo: the fit of one process, also when a rank has no rows."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from chassis_kernels import StreamingRidge

SHARES = {"both": 150, "the second has none": 400}  # rows of the first rank, of 400
SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from chassis_kernels import StreamingRidge

folder, shares = sys.argv[1], json.loads(sys.argv[2])
dist.init_process_group("gloo")
rank = dist.get_rank()
x, y = torch.load(f"{folder}/rows.pt")
found = []
for first in shares:
    mine = slice(0, first) if rank == 0 else slice(first, None)
    ridge = StreamingRidge(0.01)
    for rows in zip(x[mine].split(64), y[mine].split(64)):
        if len(rows[0]):
            ridge.partial_fit(*rows)
    ridge.all_reduce()
    found.append((ridge.n_samples_seen_, torch.as_tensor(ridge.coef_), torch.as_tensor(ridge.intercept_)))
torch.save(found, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(rows, [what each rank found, by share])."""
    folder = tmp_path_factory.mktemp("torchrun")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator, dtype=torch.float64) * torch.arange(1, 13) ** -0.7 + 4
    y = x @ torch.ones(12, 3, dtype=torch.float64) + torch.randn(400, 3, generator=generator)
    torch.save((x, y), folder / "rows.pt")
    (folder / "run.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", "localhost:0", str(folder / "run.py"), str(folder), str(list(SHARES.values()))]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return (x, y), [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("share", SHARES)
def test_two_processes_equal_one(runs, share):
    rows, ranks = runs
    one = StreamingRidge(0.01).fit(*rows)
    for found in ranks:
        seen, coef, intercept = found[list(SHARES).index(share)]
        assert seen == 400
        np.testing.assert_allclose(coef, one.coef_, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(intercept, one.intercept_, rtol=1e-6, atol=1e-6)
