"""bridge_project's Triton kernels: few and small cases of what test_bridge_project.py asks of the others."""

import pytest
import torch
from bridge_project_problems import check, problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import far_apart
from test_bridge_project import FLOATS

from chassis_kernels import BridgeTable, backends, bridge_project

pytestmark = pytest.mark.skipif(
    bool(backends.why_not("bridge_project", "triton", "cpu")), reason="no interpreter to run kernels with"
)
BUDGET = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(autouse=True)
def on_triton():
    with backends.use_backend("triton"):
        yield


@given(
    n=st.integers(0, 9),
    v=st.tuples(st.integers(1, 140), st.integers(1, 140)),
    entries=st.integers(0, 3),
    listed=st.integers(0, 5),
    dense=st.booleans(),
    blocked=st.booleans(),
    normalize=st.booleans(),
    floor=st.booleans(),
    index=st.booleans(),
    several=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    temperature=st.sampled_from([1.0, 2.0]),
    seed=st.integers(0, 99),
)
@BUDGET
def test_values(n, v, entries, listed, dense, blocked, normalize, floor, index, several, dtype, temperature, seed):
    options = {"temperature": temperature, "normalize": normalize, "floor": floor, "index": index, "several": several}
    check(problem(n, *v, entries, listed, dense, blocked, seed, **options).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_several_tiles_of_rows_and_tokens(dtype):
    """Sizes that are no multiples of a tile; one base token with far more entries than the others."""
    p = problem(9, 150, 67, blocked=True, seed=1).to(dtype)
    ids = p.table.ids.clone()
    ids[p.table.start[:-1][p.table.start.diff() == 1]] = 3
    check(p._replace(table=BridgeTable(p.table.start, ids, p.table.weights, 67, 150)))


def test_listed_parts_of_a_batch(monkeypatch):
    from chassis_kernels.triton import bridge_project as kernels

    monkeypatch.setattr(kernels, "PART", 4)
    check(problem(9, 30, 20, listed=5))
    check(problem(9, 30, 20, listed=5, several=True))
    check(problem(8, 30, 20, several=True))


def test_minus_infinity_and_large_offsets():
    p = problem(8, blocked=True, seed=4)
    p.logits[:, ::3] = -torch.inf
    p.logits[2:4] = -torch.inf
    p.logits[4] += 1e4
    p.logits[5] -= 1e4
    found = check(p)
    assert (found.log_q[2:4] == -torch.inf).all() and not found.mass[2:4].any() and (found.uncertainty[2:4] == 1).all()


def test_nan_is_not_hidden():
    p = problem()
    p.logits[1, 3], p.logits[3] = torch.nan, torch.nan
    found = bridge_project(p.logits, p.table)
    assert found.mass[[1, 3]].isnan().all() and not found.mass[[0, 2, 4]].isnan().any()


def test_underflow_leaves_no_mass_and_no_nan():
    p = problem(v_b=90)
    p.logits[:, 7] += 500
    assert (check(p).log_q == -torch.inf).any()


@pytest.mark.parametrize("empty", [{"n": 0}, {"entries": 0}, {"v_b": 1}, {"dense": False, "listed": 0}], ids=str)
def test_empty_inputs(empty):
    for blocked in (False, True):
        check(problem(blocked=blocked, **empty))


def test_rows_far_apart_are_reached(int32_overflow_stops):
    """Offsets past 2^31."""
    p = problem(4, 40, 30)
    apart = bridge_project(far_apart(p.logits), p.table)
    for a, b in zip(apart, bridge_project(p.logits, p.table), strict=True):
        assert torch.equal(a, b)
