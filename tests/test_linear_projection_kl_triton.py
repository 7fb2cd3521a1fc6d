"""linear_projection_kl's Triton kernels beyond what test_linear_projection_kl.py asks of every backend: blocks and tiles."""

import pytest
import torch
from hypothesis import given, settings
from linear_projection_problems import DRAWN, DTYPES, check, check_drawn, module, problem, run
from support import BUDGET

from chassis_kernels import backends, use_backend

pytestmark = pytest.mark.skipif(
    bool(backends.why_not("linear_projection_kl", "triton", "cpu")), reason="no interpreter for Triton kernels"
)


@pytest.fixture(autouse=True)
def triton():
    with use_backend("triton"):
        yield


@given(drawn=DRAWN)
@settings(BUDGET, max_examples=12)
def test_value_and_gradients(drawn):
    check_drawn(**drawn)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_blocks_and_tiles(dtype, monkeypatch):
    from chassis_kernels.triton import products

    monkeypatch.setattr(module, "BLOCK_ROWS", (5, 5))
    monkeypatch.setattr(products, "TILE", 100)
    g = torch.Generator().manual_seed(5)
    labels = {"labels": torch.randint(-1, 1100, (1, 14), generator=g), "label_weight": torch.rand(1, 14, generator=g)}
    check(problem(1, 14, 9, 1100, 700, 120, 2, 6, 90, temperature=1.5, student_softcap=20.0, **labels).to(dtype))


def test_each_row_of_logits_is_made_once_a_block_at_a_time(monkeypatch):
    from chassis_kernels.triton import linear_projection_kl as kernels

    made, product = [], kernels.product
    monkeypatch.setattr(kernels, "product", lambda *args, **more: made.append(args[2].shape) or product(*args, **more))
    monkeypatch.setattr(module, "BLOCK_ROWS", (4, 4))
    p = problem(1, 30, 30, 200, 100, 3, 1, 20, 20)
    p.chunks.student[0] = torch.cat([torch.full((6,), 7), torch.arange(7).repeat(3), torch.full((3,), -1)])
    p.chunks.valid[:] = True
    p.chunks.teacher[0, :8] = torch.arange(8)
    run(p)
    blocks = [rows for rows, width in made if width == 200]
    # no position predicts the first token
    assert sorted(blocks) == [3] * 7 + [5] and len(made) == 3 * len(blocks)


def test_two_runs_give_the_same_bits():
    p = problem(2, 20, 20, 300, 200, 30, 3, 20, 100)
    first, second = run(p), run(p)
    assert torch.equal(first[0], second[0]) and all(map(torch.equal, first[2], second[2]))
