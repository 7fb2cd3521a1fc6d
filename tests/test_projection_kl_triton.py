"""projection_kl's Triton kernels beyond what test_projection_kl.py asks of every backend: tiles, long columns, far rows."""

import pytest
import torch
from hypothesis import given, settings
from projection_problems import DRAWN, check, check_drawn, problem, run
from support import BUDGET, HALF, far_apart

from chassis_kernels import backends, use_backend
from chassis_kernels.chunks import layout
from chassis_kernels.reference import projection_kl as reference
from chassis_kernels.sparse import SparseProjection
from chassis_kernels.triton import tuning

pytestmark = pytest.mark.skipif(
    bool(backends.why_not("projection_kl", "triton", "cpu")), reason="no interpreter for Triton kernels"
)


@pytest.fixture(autouse=True)
def triton():
    with use_backend("triton"):
        yield


@given(drawn=DRAWN)
@settings(BUDGET, max_examples=12)
def test_value_and_gradient(drawn):
    check_drawn(**drawn)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("tail", [False, True])
def test_more_than_one_tile(dtype, tail):
    p = problem(1, 6, 7, 1500, 1300, 3, 3, 600, tail=tail, labelled=True, temperature=1.5)
    p.chunks.valid[:] = True
    check(p.to(dtype))


def test_columns_of_many_edges_are_summed_in_pieces():
    """Half of the student tokens map to one teacher token, as to a lone byte; some map to it twice."""
    p = problem(1, 4, 4, 700, 29, 2, 2, labelled=True)
    ids = p.projection.indices.clone()
    ids[::2, 0], ids[::8, 1] = 3, 3
    p.chunks.valid[:] = True
    check(p._replace(projection=SparseProjection(ids, p.projection.weights, 29)))


def test_a_column_named_twice_counts_twice():
    p = problem(columns=torch.tensor([4, 4, 9, 20, 4, 0]))
    check(p)


@pytest.mark.parametrize("architecture", [a for a in tuning.ARCHITECTURES if a != "interpreter"])
def test_every_shipped_tuning_entry(architecture, monkeypatch):
    shipped = tuning.tables("projection_kl")
    for size in {size for table in shipped.values() for size in table[architecture]}:
        chosen = {k: {"interpreter": {"any": t[architecture].get(size, t[architecture]["any"])}} for k, t in shipped.items()}
        monkeypatch.setattr(tuning, "tables", lambda op, chosen=chosen: chosen)
        arguments = backends.OPS["projection_kl_"].example("cpu")
        torch.ops.chassis.projection_kl_(*arguments)
        grad = arguments[0].clone()
        with use_backend("reference"):
            torch.ops.chassis.projection_kl_(*arguments)
        torch.testing.assert_close(grad, arguments[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tail", [False, True])
def test_rows_far_apart_are_reached(tail, int32_overflow_stops):
    """Offsets past 2^31 in logits and gradient, which is written over them."""
    p = problem(1, 4, 4, 60, 29, labelled=True).to(torch.bfloat16)
    for ids in p.chunks[:2]:
        ids[:] = torch.tensor([0, 0, 1, 1])
    p.chunks.valid[:] = True
    plan, labels = layout(p.chunks, None, False, torch.float32), p.options["labels"]
    arguments = reference.op_arguments(p.student, p.teacher, p.projection, plan, torch.arange(9), labels, (1.0, 0, tail))
    weights = torch.ones(5), torch.ones(4)
    student, teacher = far_apart(arguments[0]), far_apart(arguments[1])
    kl, _, nll = torch.ops.chassis.projection_kl_(student, *weights, student, teacher, *arguments[2:])
    near = arguments[0].clone()
    near_kl, _, near_nll = torch.ops.chassis.projection_kl_(near, *weights, near, *arguments[1:])
    assert torch.equal(kl, near_kl) and torch.equal(nll, near_nll) and torch.equal(student, near)


def test_two_runs_give_the_same_bits():
    p = problem(2, 20, 20, 300, 200, 3, 9, 100, labelled=True)
    first, second = run(p), run(p)
    assert torch.equal(first[0], second[0]) and torch.equal(first[2], second[2])
