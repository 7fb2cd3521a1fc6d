"""Ridge from moments: the normal equations in float64, whatever the dtype, split and shape; honest about rank."""

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.utils.estimator_checks import parametrize_with_checks
from support import LiveMemory

from chassis_kernels import Moments, ridge, solvers
from chassis_kernels.streaming_ridge import StreamingRidge


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def problem(n=300, d=12, t=4, dtype=torch.float64):
    x = torch.randn(n, d, dtype=torch.float64) @ torch.randn(d, d, dtype=torch.float64) + 5
    y = x @ torch.randn(d, t, dtype=torch.float64) + torch.randn(n, t, dtype=torch.float64) - 3
    return x.to(dtype), y.to(dtype)


def normal_equations(x, y, alpha, intercept=True):
    x, y = x.double(), y.double()
    mean_x, mean_y = (x.mean(0), y.mean(0)) if intercept else (x[0] * 0, y[0] * 0)
    x, y = x - mean_x, y - mean_y
    W = torch.linalg.solve(x.T @ x + alpha * torch.eye(x.shape[1]).double(), x.T @ y)
    return W, mean_y - mean_x @ W


@given(n=st.integers(2, 40), d=st.integers(1, 30), t=st.integers(1, 4), alpha=st.sampled_from([1e-3, 1.0, 100.0]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_fit_ridge_solves_the_normal_equations_in_primal_and_dual_form(n, d, t, alpha):
    x, y = problem(n, d, t)
    W, b = ridge.fit_ridge(x, y, alpha)
    expected_W, expected_b = normal_equations(x, y, alpha)
    assert (W.shape, b.shape, W.dtype) == ((d, t), (1, t), torch.float64)
    # float64 rounding times the condition number, at most |x|^2 n / alpha ~ 1e8
    torch.testing.assert_close(W, expected_W, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(b[0], expected_b, rtol=1e-6, atol=1e-6)


def test_bf16_rows_with_outlier_columns_at_tiny_alpha_are_within_half_a_percent():
    """And the usual ways to sum products in float32 are not: each loses what the mean or an early rounding takes."""
    n, d, t = 32768, 512, 16
    spectrum = torch.arange(1, d + 1) ** -1.25  # cond(S) ~ 1e7
    x = (torch.randn(n, d) * spectrum) @ torch.linalg.qr(torch.randn(d, d))[0]
    x /= x.std()
    x[:, 7] += 60
    x[:, 99] -= 25
    x = x.bfloat16()
    y = (x.float() @ torch.randn(d, t) / math.sqrt(d) + 0.5 * torch.randn(n, t)).bfloat16()
    centred = x.double() - x.double().mean(0)
    S, C = centred.T @ centred, centred.T @ y.double()
    alpha = 1e-8 * float(S.trace()) / d
    penalty = alpha * torch.eye(d, dtype=torch.float64)
    expected = torch.linalg.solve(S + penalty, C)

    def error(W):
        return float((W - expected).norm() / expected.norm())

    def error_of(xx, xy):
        return error(torch.linalg.solve(xx.double() + penalty, xy.double()))

    f, g = x.float(), y.float()
    with_ones = torch.cat([f, torch.ones(n, 1)], 1)
    textbook = with_ones.T @ with_ones
    textbook.diagonal()[:d] += alpha
    shifted = f - f[:2048].mean(0)
    drift, running = shifted.mean(0), Moments(d, t)
    for rows, targets in zip(f.split(2048), g.split(2048), strict=True):
        running.update(rows, targets)
        for tensor in running.flush()._state.values():
            tensor.copy_(tensor.float())
    rounded = (f - f.mean(0)).bfloat16().float()
    assert error(torch.linalg.solve(textbook, with_ones.T @ g)[:d]) > 0.05
    assert error_of(rounded.T @ rounded, rounded.T @ (g - g.mean(0))) > 0.05
    shift = error_of(shifted.T @ shifted - n * drift.outer(drift), shifted.T @ g - n * drift.outer(g.mean(0)))
    assert shift > 0.01
    streamed = Moments(d, t)
    for start in range(0, n, 3000):
        streamed.update(x[start : start + 3000], y[start : start + 3000])
    ours = error(ridge.solve(streamed, 1e-8).W)
    assert ours < 0.005 and error_of(running.S, running.C) > 2 * ours  # merged in float32
    W, b = ridge.fit_ridge(x, y, 1e-8, alpha_scale="trace")
    assert error(W) < 0.005
    torch.testing.assert_close(b[0].double(), y.double().mean(0) - x.double().mean(0) @ W.double(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("alpha_scale", ["trace", "none"])
def test_a_path_equals_its_single_solutions(intercept, alpha_scale):
    x, y = problem()
    moments = Moments(12, 4).update(x, y)
    options = {"alpha_scale": alpha_scale, "intercept": intercept}
    alphas = [1e-6, 1e-2, 3.0]
    for alpha, from_path in zip(alphas, ridge.solve_path(moments, alphas, **options), strict=True):
        single = ridge.solve(moments, alpha, **options)
        gram = moments.S if intercept else x.T @ x
        unit = float(gram.trace()) / 12 if alpha_scale == "trace" else 1.0
        W, b = normal_equations(x, y, alpha * unit, intercept)
        assert from_path.alpha == single.alpha == pytest.approx(alpha * unit)
        for solution in (from_path, single):
            torch.testing.assert_close(solution.W, W, rtol=1e-7, atol=1e-8)
            torch.testing.assert_close(solution.b, b, rtol=1e-7, atol=1e-7)
            assert solution.condition == pytest.approx(float(torch.linalg.cond(gram)), rel=1e-5)
            hat = torch.linalg.solve(gram + alpha * unit * torch.eye(12).double(), gram).trace()
            assert solution.dof == pytest.approx(float(hat), rel=1e-7)
            assert solution.negative_eigenvalues == 0


def test_solving_leaves_the_moments_as_they_were():
    moments = Moments(12, 4).update(*problem())
    before = moments.copy()
    ridge.solve(moments, 0.1, intercept=False)
    list(ridge.solve_path(moments, [0.1, 1.0], intercept=False))
    assert torch.equal(moments.S, before.S) and torch.equal(moments.C, before.C)


@pytest.mark.parametrize("intercept", [True, False])
def test_absolute_alpha_and_weights_are_those_of_scikit_learn(intercept):
    x, y = problem()
    weight = torch.rand(300).double() + 0.1
    theirs = Ridge(alpha=2.0, fit_intercept=intercept).fit(x.numpy(), y.numpy(), sample_weight=weight.numpy())
    ours = StreamingRidge(alpha=2.0, alpha_scale="none", fit_intercept=intercept).fit(x, y, sample_weight=weight)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(ours.predict(x.numpy()), theirs.predict(x.numpy()), rtol=1e-8)


def test_an_alpha_below_the_floor_is_raised_with_a_warning_that_says_why():
    x, y = problem()
    x = torch.cat([x, x[:, :2]], 1)  # rank 12 of 14
    moments = Moments(14, 4).update(x, y)
    with pytest.warns(
        RuntimeWarning, match=r"raised to the floor .*cond\(S\).*degrees of freedom 12\.\d of 14, \d+ negative"
    ):
        solution = ridge.solve(moments, 1e-17)
    assert solution.alpha == pytest.approx(10 * torch.finfo(torch.float64).eps * float(solution.eigenvalues[-1]))
    assert solution.W.isfinite().all()
    with pytest.warns(RuntimeWarning, match="raised to the floor"):
        list(ridge.solve_path(moments, [1e-17]))


def test_alpha_zero_is_least_squares_and_of_minimal_norm_when_rank_is_missing():
    x, y = problem(40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        W, b = ridge.fit_ridge(x, y, 0.0)
    torch.testing.assert_close(W, normal_equations(x, y, 0.0)[0], rtol=1e-8, atol=1e-8)
    centred = [t - t.mean(0) for t in (torch.cat([x, x], 1), y)]
    minimal = torch.linalg.lstsq(*centred, driver="gelsd").solution
    with pytest.warns(RuntimeWarning, match="rank 12: the solution of minimal norm"):
        W, b = ridge.fit_ridge(torch.cat([x, x], 1), y, 0.0)
    torch.testing.assert_close(W, minimal, rtol=1e-6, atol=1e-8)
    short = x[:6]
    with pytest.warns(RuntimeWarning, match="rank 5: the solution of minimal norm"):  # the dual: 6 centred rows
        W, b = ridge.fit_ridge(short, y[:6], 0.0)
    torch.testing.assert_close(short @ W + b, y[:6], rtol=1e-8, atol=1e-8)


def test_rounding_larger_than_alpha_is_reported_and_does_not_blow_up():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 3, generator=generator) @ torch.randn(3, 40, generator=generator)  # rank 3 but for fp32 rounding
    y = x[:, :2] + 0.1 * torch.randn(4000, 2, generator=generator)
    with pytest.warns(RuntimeWarning, match="smaller than the rounding error of S.* negative eigenvalues"):
        W, _ = ridge.fit_ridge(x, y, 1e-12, alpha_scale="trace")
    assert W.isfinite().all() and ((x @ W - y).square().mean() < 0.02)


def test_constant_columns_get_no_weight():
    x, y = problem()
    x = torch.cat([x, torch.full((300, 1), 7.0)], 1)
    W, b = ridge.fit_ridge(x, y, 1e-3)
    assert not W[12].any()
    torch.testing.assert_close(W[:12], normal_equations(x[:, :12], y, 1e-3)[0], rtol=1e-8, atol=1e-9)
    constant, intercept = ridge.fit_ridge(torch.ones(5, 3), y[:5], 1.0)
    assert not constant.any()
    torch.testing.assert_close(intercept[0], y[:5].mean(0))


@pytest.mark.parametrize("n", [300, 9], ids=["primal", "dual"])
def test_targets_through_an_unembedding_are_those_targets(n):
    x, _ = problem(n)
    hidden = x @ torch.randn(12, 5, dtype=torch.float64) + torch.randn(n, 5, dtype=torch.float64)
    unembedding = torch.randn(40, 5)  # float32 among float64 rows
    W, b = ridge.fit_ridge(x, (hidden, unembedding), 0.5)
    explicit, expected_b = ridge.fit_ridge(x, hidden @ unembedding.double().T, 0.5)
    assert W.shape == explicit.shape == (12, 40) and W.hidden.shape == (12, 5) and b.shape == (1, 40)
    torch.testing.assert_close(W.dense(), explicit, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(b, expected_b, rtol=1e-8, atol=1e-7)
    torch.testing.assert_close(x @ W + b, x @ explicit + b, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match=r"W_U torch.float32 \(40, 6\)\): expected floats W_U \[V, 5\]"):
        ridge.fit_ridge(x, (hidden, torch.randn(40, 6)), 0.5)


@pytest.mark.parametrize("n", [300, 9], ids=["primal", "dual"])
def test_weights_and_dropped_rows_in_memory(n):
    x, y = problem(n)
    weight = torch.arange(n).double() % 3
    whole = weight.long()
    W, b = ridge.fit_ridge(x, y, 0.5, weight=weight)
    expected, expected_b = normal_equations(x.repeat_interleave(whole, 0), y.repeat_interleave(whole, 0), 0.5)
    torch.testing.assert_close(W, expected, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(b[0], expected_b, rtol=1e-7, atol=1e-7)
    x[5, 3], y[7, 1] = torch.nan, torch.inf
    good = torch.ones(n, dtype=torch.bool)
    good[[5, 7]] = False
    dropped, _ = ridge.fit_ridge(x, y, 0.5, weight=weight, nan="drop")
    torch.testing.assert_close(dropped, ridge.fit_ridge(x[good], y[good], 0.5, weight=weight[good])[0])


def test_rows_wait_while_they_are_fewer_than_columns_and_need_no_square_matrix():
    x, y = problem(20, 3000)
    with LiveMemory() as memory:
        few = StreamingRidge(0.1).partial_fit(x[:8], y[:8]).partial_fit(x[8:], y[8:])
        predicted = few.predict(x)
    assert (3000, 3000) not in memory.shapes
    x, y = x[:, :15], y
    few, many = StreamingRidge(0.1).fit(x[:9], y[:9]), StreamingRidge(0.1).partial_fit(x, y)
    expected, _ = normal_equations(x[:9], y[:9], few.alpha_)
    np.testing.assert_allclose(few.coef_, expected.T, rtol=1e-7)
    few.partial_fit(x[9:14], y[9:14]).partial_fit(x[14:], y[14:])  # the fifteenth row makes them moments
    np.testing.assert_allclose(few.coef_, many.coef_, rtol=1e-8)
    assert predicted.shape == (20, 4) and few.moments_.rows == few.n_samples_seen_ == 20


def test_a_device_whose_eigensolver_fails_is_named_and_the_cpu_asked():
    class Elsewhere:  # as far as the fallback looks at a tensor
        device = torch.device("cuda", 1)

        def cpu(self):
            return torch.eye(3, dtype=torch.float64)

    class Moved(torch.Tensor):
        def to(self, device):
            assert device == Elsewhere.device
            return self

    def eigh(matrix):
        if isinstance(matrix, Elsewhere):
            raise torch.linalg.LinAlgError("failed to converge\nat length")
        return tuple(t.as_subclass(Moved) for t in torch.linalg.eigh(matrix))

    with pytest.warns(RuntimeWarning, match=r"^eigh failed on cuda:1 \(failed to converge\): done on the CPU instead$"):
        values, _ = solvers.decompose(eigh, Elsewhere())
    assert values.tolist() == [1, 1, 1]
    with pytest.raises(torch.linalg.LinAlgError):  # on the CPU there is nothing to fall back to
        solvers.decompose(torch.linalg.cholesky, -torch.eye(3))


@pytest.mark.parametrize("alpha", [-1.0, math.nan, math.inf])
def test_a_senseless_alpha_is_refused(alpha):
    moments = Moments(12, 4).update(*problem())
    with pytest.raises(ValueError, match=f"alpha={alpha}: expected a finite number that is not negative"):
        ridge.solve(moments, alpha)
    with pytest.raises(ValueError, match="alpha="):
        ridge.solve_path(moments, [1.0, alpha])


def test_missing_rows_targets_and_bad_values_are_clear_errors():
    x, y = problem(8)
    with pytest.raises(ValueError, match="seen no rows"):
        ridge.solve(Moments(12, 4))
    with pytest.raises(ValueError, match="no rows"):
        ridge.fit_ridge(x[:0], y[:0], 1.0)
    with pytest.raises(ValueError, match="dim_y=0"):
        ridge.solve(Moments(12).update(x))
    with pytest.raises(ValueError, match='expected "trace" or "none"'):
        ridge.fit_ridge(x, y, 1.0, alpha_scale="relative")
    with pytest.raises(ValueError, match=r"X \(8, 12\), Y \(7, 4\)"):
        ridge.fit_ridge(x, y[:7], 1.0)
    for rows in (x, x.repeat(3, 1)):  # the dual, then the moments
        rows = rows.clone()
        rows[5, 2] = torch.nan
        with pytest.raises(ValueError, match="NaN or infinity"):
            ridge.fit_ridge(rows, y.repeat(len(rows) // 8, 1), 1.0)


@pytest.mark.filterwarnings("ignore:Estimator StreamingRidge does not inherit")
@parametrize_with_checks([StreamingRidge(), StreamingRidge(alpha=1.0, alpha_scale="none", fit_intercept=False)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_partial_fit_in_any_batches_equals_fit():
    x, y = problem(2000)
    whole, parts = StreamingRidge(0.1).fit(x, y), StreamingRidge(0.1)
    for start in range(0, 2000, 37):
        parts.partial_fit(x[start : start + 37], y[start : start + 37])
    np.testing.assert_allclose(parts.coef_, whole.coef_, rtol=1e-9)
    assert parts.score(x, y) == pytest.approx(whole.score(x, y), rel=1e-12)
    parts.partial_fit(x, y)  # solved again after new rows: twice the data, twice tr(S)
    np.testing.assert_allclose(parts.coef_, whole.coef_, rtol=1e-9)
    assert parts.alpha_ == pytest.approx(2 * whole.alpha_)


def test_tensors_give_tensors_and_arrays_give_arrays():
    x, y = problem(dtype=torch.bfloat16)
    fitted = StreamingRidge().fit(x, y[:, 0])
    assert fitted.coef_.shape == (12,) and isinstance(fitted.intercept_, float)
    assert fitted.predict(x).dtype == torch.float32 and fitted.predict(x).shape == (300,)
    assert isinstance(fitted.predict(x.float().numpy()), np.ndarray)
    assert fitted.score(x, y[:, 0]) > 0.9


def test_the_estimator_does_not_import_scikit_learn():
    code = "import sys; from chassis_kernels.streaming_ridge import StreamingRidge as R; R().fit([[1.], [2]], [1., 2]); "
    subprocess.run([sys.executable, "-c", code + "assert 'sklearn' not in sys.modules"], check=True)
