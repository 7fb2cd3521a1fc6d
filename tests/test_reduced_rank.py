"""Of all coefficients of rank k those with the least penalised error: against Eckart & Young and against descent."""

import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import parametrize_with_checks

from chassis_kernels import ReducedRankRegression, StreamingRidge


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def problem(n=300, d=8, t=6):
    x = torch.randn(n, d, dtype=torch.float64) @ torch.randn(d, d, dtype=torch.float64) + 5
    low = torch.randn(d, 3, dtype=torch.float64) @ torch.randn(3, t, dtype=torch.float64)
    return x, x @ low + torch.randn(n, t, dtype=torch.float64) - 3


def penalised(W, x, y, alpha):
    x, y = x - x.mean(0), y - y.mean(0)
    return float((y - x @ W).square().sum() + alpha * W.square().sum())


@pytest.mark.parametrize("n", [300, 7], ids=["primal", "dual"])
@pytest.mark.parametrize("alpha", [1e-6, 50.0])
def test_no_matrix_of_that_rank_has_a_smaller_penalised_error(n, alpha):
    x, y = problem(n)
    for rank in (1, 2, 4):
        fitted = ReducedRankRegression(rank, alpha, "none").fit(x, y)
        W = torch.as_tensor(fitted.coef_).T
        assert torch.linalg.matrix_rank(W, rtol=1e-9) == rank
        best = penalised(W, x, y, alpha)
        full = penalised(torch.as_tensor(StreamingRidge(alpha, "none").fit(x, y).coef_).T, x, y, alpha)
        assert best == pytest.approx(full + float((fitted.singular_values_[rank:] ** 2).sum()), rel=1e-6, abs=1e-6)
        U, V = (torch.as_tensor(f.copy()).requires_grad_() for f in (fitted.x_factors_, fitted.y_factors_))
        centred = x - x.mean(0), y - y.mean(0)
        loss = (centred[1] - centred[0] @ U @ V).square().sum() + alpha * (U @ V).square().sum()
        for gradient, factor in zip(torch.autograd.grad(loss, (U, V)), (U, V), strict=True):
            assert gradient.norm() * factor.norm() < 1e-6 * max(1.0, float(centred[1].square().sum()))
        for _ in range(20):
            other = (U + 0.1 * torch.randn_like(U)) @ (V + 0.1 * torch.randn_like(V))
            assert penalised(other.detach(), x, y, alpha) >= best


def test_full_rank_is_ridge_and_factors_are_the_coefficients():
    x, y = problem()
    for intercept in (True, False):
        full, single = (
            ReducedRankRegression(None, 0.1, fit_intercept=intercept),
            StreamingRidge(0.1, fit_intercept=intercept),
        )
        np.testing.assert_allclose(full.fit(x, y).coef_, single.fit(x, y).coef_, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(full.intercept_, single.intercept_, rtol=1e-7, atol=1e-8)
    low = ReducedRankRegression(2, 0.1).fit(x, y)
    np.testing.assert_allclose((low.x_factors_ @ low.y_factors_).T, low.coef_, rtol=1e-12)
    np.testing.assert_allclose(low.y_factors_ @ low.y_factors_.T, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(
        ReducedRankRegression(99, 0.1).fit(x, y).coef_, StreamingRidge(0.1).fit(x, y).coef_, rtol=1e-8
    )
    with pytest.raises(ValueError, match="rank=0"):
        ReducedRankRegression(0).fit(x, y)


def test_a_low_rank_map_is_recovered_where_plain_ridge_fits_the_noise():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(120, 40, generator=generator, dtype=torch.float64)
    low = torch.randn(40, 2, generator=generator).double() @ torch.randn(2, 30, generator=generator).double()
    y = x @ low + 8 * torch.randn(120, 30, generator=generator, dtype=torch.float64)
    errors = [
        float((torch.as_tensor(e.fit(x, y).coef_).T - low).norm()) for e in (ReducedRankRegression(2), StreamingRidge())
    ]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.filterwarnings("ignore:Estimator ReducedRankRegression does not inherit")
@parametrize_with_checks([ReducedRankRegression(), ReducedRankRegression(1, fit_intercept=False)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)
