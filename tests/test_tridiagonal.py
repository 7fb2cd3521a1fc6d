"""S = Q T Qᵀ and the ridge path on it, against dense float64 solutions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import rerun_on

from chassis_kernels import backends
from chassis_kernels.moments import Moments
from chassis_kernels.ridge import _least_squares
from chassis_kernels.ridge_path import Eigenbasis, TridiagonalBasis, basis_of
from chassis_kernels.tridiagonal import BLOCK, Tridiagonal

OPS = ("tridiagonal_reduce_", "tridiagonal_path", "tridiagonal_solve")
ALPHAS = torch.tensor([1e-3, 1.0, 300.0], dtype=torch.float64)
on_each = pytest.mark.parametrize("backend", ["reference", "cpu"])
sizes = pytest.mark.parametrize("size", [1, 2, 3, 13, 32, 33, BLOCK, BLOCK + 1, 150])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def positive(size, rows=None):
    x = torch.randn(rows or 2 * size, size, dtype=torch.float64)
    return x.T @ x


def dense(S, C, alpha):
    return torch.linalg.solve(S + alpha * torch.eye(len(S), dtype=torch.float64), C)


def orthogonal(found):
    identity = torch.eye(len(found.diagonal), dtype=torch.float64)
    return found.path(identity, ALPHAS)[0].T


@on_each
@sizes
def test_q_and_t_give_the_matrix_back(backend, size):
    S = positive(size)
    with backends.use_backend(backend):
        found = Tridiagonal.of(S.clone())
        Q = orthogonal(found)
    T = torch.diag(found.diagonal) + torch.diag(found.off, 1) + torch.diag(found.off, -1)
    torch.testing.assert_close(Q @ Q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(Q @ T @ Q.T, S, rtol=0, atol=1e-14 * size * float(S.trace()))


@on_each
@sizes
@pytest.mark.parametrize("targets", [1, 5, 33])
def test_path_and_solve_are_the_dense_solutions(backend, size, targets):
    S, C = positive(size), torch.randn(size, targets, dtype=torch.float64)
    W = torch.stack([dense(S, C, alpha) for alpha in ALPHAS])
    with backends.use_backend(backend):
        found = Tridiagonal.of(S.clone())
        R, dots, squares, traces = found.path(C, ALPHAS)
        which = torch.arange(targets) % 3
        own = found.solve(R, ALPHAS[which])
        same = found.solve(R, ALPHAS[1].expand(targets))
    identity = torch.eye(size, dtype=torch.float64)
    inverses = [dense(S, identity, alpha) for alpha in ALPHAS]
    torch.testing.assert_close(dots, (C * W).sum(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(squares, W.square().sum(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(traces, torch.stack([inverse.trace() for inverse in inverses]), rtol=1e-9, atol=0)
    torch.testing.assert_close(own, W[which, :, torch.arange(targets)].T, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(same, W[1], rtol=1e-9, atol=1e-12)


@given(
    size=st.integers(1, 120),
    targets=st.integers(1, 40),
    count=st.integers(1, 25),
    scale=st.sampled_from([1e-60, 1e-6, 1.0, 1e9]),
    rank=st.integers(1, 200),
    strided=st.booleans(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_shape_scale_and_rank(size, targets, count, scale, rank, strided):
    S = scale * positive(size, rank)
    C = torch.randn(size, targets * (2 if strided else 1), dtype=torch.float64)[:, :: 2 if strided else 1]
    alphas = scale * torch.logspace(-2, 3, count, dtype=torch.float64)
    found = Tridiagonal.of(S.clone())
    R, dots, squares, _ = found.path(C, alphas)
    for alpha, dot, square in zip(alphas, dots, squares, strict=True):
        W = dense(S, C, alpha)
        torch.testing.assert_close(found.solve(R, alpha.expand(targets)), W, rtol=1e-8, atol=1e-9 * float(W.abs().max()))
        torch.testing.assert_close(dot, (C * W).sum(0), rtol=1e-8, atol=0)
        torch.testing.assert_close(square, W.square().sum(0), rtol=1e-8, atol=0)


@on_each
@pytest.mark.parametrize(
    "S", [torch.zeros(7, 7), torch.diag(torch.arange(7.0)), torch.ones(40, 40)], ids=["0", "diagonal", "rank 1"]
)
def test_rows_that_need_no_reflector(backend, S):
    S, C = S.double(), torch.randn(len(S), 2, dtype=torch.float64)
    with backends.use_backend(backend):
        found = Tridiagonal.of(S.clone())
        R, dots, _, _ = found.path(C, ALPHAS)
        W = found.solve(R, ALPHAS[[1, 2]])
    for j, alpha in enumerate(ALPHAS[[1, 2]]):
        expected = dense(S, C[:, j], alpha)
        torch.testing.assert_close(W[:, j], expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(dots[j + 1, j], C[:, j] @ expected, rtol=1e-11, atol=0)


def test_any_number_of_threads_gives_the_same():
    S, C = positive(700), torch.randn(700, 90, dtype=torch.float64)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            basis = Tridiagonal.of(S.clone())
            found.append((basis.diagonal, basis.off.abs(), *basis.path(C, ALPHAS)[1:]))
    finally:
        torch.set_num_threads(threads)
    for alone, shared in zip(*found, strict=True):
        torch.testing.assert_close(shared, alone, rtol=1e-10, atol=1e-10)


def test_inertia_and_the_bound_of_the_spectrum():
    S = positive(50)
    values, found = torch.linalg.eigvalsh(S), Tridiagonal.of(S.clone())
    smallest, largest = float(values[0]), float(values[-1])
    assert found.definite(-0.999 * smallest) and not found.definite(-1.001 * smallest)
    assert largest <= found.largest() <= 2 * largest


@on_each
def test_nothing_to_solve_and_a_transposed_matrix(backend):
    S = positive(6)
    with backends.use_backend(backend):
        found = Tridiagonal.of(S.clone().T)
        R, dots, squares, traces = found.path(torch.empty(6, 0, dtype=torch.float64), ALPHAS)
        assert R.shape == (6, 0) and dots.shape == squares.shape == (3, 0) and traces.isfinite().all()
        assert found.solve(R, ALPHAS[:0]).shape == (6, 0)
        R, *sums = found.path(torch.eye(6, dtype=torch.float64), ALPHAS[:0])
    assert [tuple(each.shape) for each in sums] == [(0, 6), (0, 6), (0,)]
    T = torch.diag(found.diagonal) + torch.diag(found.off, 1) + torch.diag(found.off, -1)
    torch.testing.assert_close(R.T @ T @ R, S, rtol=1e-12, atol=1e-12)


def test_wrong_shapes_are_refused():
    found = Tridiagonal.of(positive(6))
    C = torch.ones(6, 2, dtype=torch.float64)
    for right, alphas in ((C[:5], ALPHAS), (C.repeat(2, 1), ALPHAS), (C[:, 0], ALPHAS), (C, ALPHAS[None])):
        with pytest.raises(ValueError, match=r"expected \[6, T\] and \["):
            found.path(right, alphas)
    with pytest.raises(ValueError, match=r"expected \[6, T\] and \[2\]"):
        found.solve(C, ALPHAS)
    with pytest.raises(ValueError, match="expected float64"):
        found.path(C.float(), ALPHAS)
    for S in (C, C[0], positive(3).float(), C[:0, :0]):
        with pytest.raises(ValueError, match=r"expected float64 \[D, D\]"):
            Tridiagonal.of(S)


@pytest.mark.parametrize("name", OPS)
@on_each
def test_opcheck(name, backend):
    with backends.use_backend(backend):
        torch.library.opcheck(getattr(torch.ops.chassis, name).default, backends.OPS[name].example("cpu"))


def problem(n=300, d=40, t=7, dtype=torch.float64):
    x = torch.randn(n, d, dtype=torch.float64) @ torch.randn(d, d, dtype=torch.float64) + 5
    noise = torch.randn(n, t, dtype=torch.float64) * torch.logspace(-1, 2, t, dtype=torch.float64)
    return x.to(dtype), (x @ torch.randn(d, t, dtype=torch.float64) + noise - 3).to(dtype)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("alpha_scale", ["trace", "none"])
def test_both_bases_judge_and_solve_alike(intercept, alpha_scale):
    x, y = problem()
    moments = Moments(40, 7).update(x, y)
    arguments = intercept, (1e-4, 1e-2, 1.0, 1e3, 1e9), alpha_scale
    fast, slow = basis_of(moments, *arguments), Eigenbasis.of(moments, *arguments)
    assert isinstance(fast, TridiagonalBasis)
    for each in (True, False):
        torch.testing.assert_close(fast.gcv(each), slow.gcv(each), rtol=1e-9, atol=0)
    torch.testing.assert_close(fast.degrees_of_freedom(), slow.degrees_of_freedom(), rtol=1e-5, atol=1e-11)
    for which in (torch.tensor(2), torch.tensor([0, 1, 2, 3, 4, 0, 1])):
        for a, b in zip(fast.coefficients(which), slow.coefficients(which), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    "alphas, scale",
    [((0.0, 1.0), 1), ((1e-18, 1.0), 1), ((1.0,), 1e-60), ((1.0,), 1e60)],
    ids=["0", "floor", "small", "large"],
)
def test_penalties_and_scales_that_need_eigenvalues_get_them(alphas, scale):
    x, y = problem()
    x = torch.cat([x, x[:, :1]], 1) * scale
    basis = basis_of(Moments(41, 7).update(x, y), True, alphas, "trace")
    assert isinstance(basis, Eigenbasis)


@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_other_backends_do_without_it(backend):
    moments = Moments(40, 7).update(*problem())
    moments.flush()
    with backends.use_backend(backend):
        basis = basis_of(moments, True, (1.0,), "trace")
    assert isinstance(basis, Eigenbasis)
    assert isinstance(basis_of(moments, True, (1.0,), "trace"), TridiagonalBasis)


def test_least_squares_without_eigenvectors_where_the_matrix_is_regular():
    x, y = problem()
    S, C = (x - x.mean(0)).T @ (x - x.mean(0)), (x - x.mean(0)).T @ y
    torch.testing.assert_close(_least_squares(S, C), torch.linalg.solve(S, C), rtol=1e-8, atol=1e-10)
    twice = torch.tensor([*range(40), 3])
    assert _least_squares(S[twice][:, twice], C[twice]) is None
    assert _least_squares(torch.zeros_like(S), C) is None
    with backends.use_backend("reference"):
        assert _least_squares(S, C) is None


def test_moments_with_nan_are_refused():
    moments = Moments(40, 7).update(*problem())
    moments._state["xx"][0, 3] = torch.nan
    with pytest.raises(ValueError, match="the moments hold NaN or infinity"):
        basis_of(moments, True, (1.0,), "trace")


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set(isa):
    rerun_on(isa, __file__, "(give_the_matrix or dense or any_shape or no_reflector or number_of_threads) and not reference")
