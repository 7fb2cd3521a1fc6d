"""The penalty that cross-validation would choose by refitting, from one pass: same errors, same choice, same solution."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.utils.estimator_checks import parametrize_with_checks

from chassis_kernels import StreamingRidge, StreamingRidgeCV
from chassis_kernels.statistics import fold_of

ALPHAS = (1e-3, 0.1, 1.0, 10.0, 100.0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def problem(n=200, d=12, t=4):
    """Targets of which each is noisier than the one before."""
    x = torch.randn(n, d, dtype=torch.float64) @ torch.randn(d, d, dtype=torch.float64) + 5
    noise = torch.randn(n, t, dtype=torch.float64) * torch.logspace(-1, 2, t, dtype=torch.float64)
    return x, x @ torch.randn(d, t, dtype=torch.float64) + noise - 3


def test_gcv_is_scikit_learns_leave_one_out_choice_in_its_own_formula():
    x, y = problem()
    ours, each = (StreamingRidgeCV(ALPHAS, "none", alpha_per_target=own).fit(x, y) for own in (False, True))
    theirs = RidgeCV(ALPHAS).fit(x.numpy(), y.numpy())
    assert ours.alpha_ == theirs.alpha_
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-8)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, rtol=1e-7)
    centred, n = x - x.mean(0), len(x)
    for row, alpha in enumerate(ALPHAS):
        shifted = centred.T @ centred + alpha * torch.eye(12, dtype=torch.float64)
        dof = float(torch.linalg.solve(shifted, centred.T @ centred).trace())
        rss = (y - torch.as_tensor(Ridge(alpha).fit(x.numpy(), y.numpy()).predict(x.numpy()))).square().sum(0)
        expected = (rss / n) / (1 - (1 + dof) / n) ** 2
        np.testing.assert_allclose(each.cv_results_["mean_squared_error"][row], expected, rtol=1e-9)
        np.testing.assert_allclose(ours.cv_results_["mean_squared_error"][row], expected.mean(), rtol=1e-9)
        assert ours.cv_results_["degrees_of_freedom"][row] == pytest.approx(dof)


@pytest.mark.parametrize("n", [200, 40, 24], ids=["many rows", "fewer than D without a fold", "fewer than D"])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("alpha_scale", ["trace", "none"])
def test_errors_by_group_are_those_of_refitting_without_each_fold(n, intercept, alpha_scale):
    d = 12 if n > 40 else 38
    x, y = problem(n, d)
    groups = torch.arange(n) // 2
    fold = fold_of(groups, 3)
    fitted, each = (
        StreamingRidgeCV(ALPHAS, alpha_scale, intercept, own, n_folds=3).fit(x, y, groups=groups) for own in (False, True)
    )
    errors = torch.zeros(len(ALPHAS), 4, dtype=torch.float64)
    for k in fold.unique():  # no group of 24 rows falls into fold 0
        out = fold == k
        for row, alpha in enumerate(ALPHAS):
            single = StreamingRidge(alpha, alpha_scale, intercept).fit(x[~out], y[~out])
            errors[row] += (single.predict(x[out]) - y[out]).square().sum(0)
    np.testing.assert_allclose(each.cv_results_["mean_squared_error"], errors / n, rtol=1e-6)
    np.testing.assert_allclose(fitted.cv_results_["mean_squared_error"], errors.mean(1) / n, rtol=1e-6)
    best = int(errors.sum(1).argmin())
    assert fitted.alpha_ == ALPHAS[best]
    assert fitted.best_score_ == pytest.approx(float(errors[best].mean()) / n)
    single = StreamingRidge(ALPHAS[best], alpha_scale, intercept).fit(x, y)
    np.testing.assert_allclose(fitted.coef_, single.coef_, rtol=1e-6, atol=1e-9)
    assert fitted.penalty_ == pytest.approx(single.alpha_)


@pytest.mark.parametrize("groups", [None, torch.arange(200) // 5], ids=["GCV", "groups"])
def test_every_target_may_have_its_own_alpha(groups):
    x, y = problem()
    fitted = StreamingRidgeCV(ALPHAS, "none", alpha_per_target=True).fit(x, y, groups=groups)
    assert len(set(fitted.alpha_)) > 1 and fitted.alpha_[-1] > fitted.alpha_[0]
    for j, alpha in enumerate(fitted.alpha_):
        alone = StreamingRidgeCV(ALPHAS, "none").fit(x, y[:, j], groups=groups)
        assert alone.alpha_ == alpha == ALPHAS[fitted.cv_results_["mean_squared_error"][:, j].argmin()]
        np.testing.assert_allclose(fitted.coef_[j], alone.coef_, rtol=1e-9)
        assert fitted.best_score_[j] == pytest.approx(alone.best_score_)


@pytest.mark.parametrize("groups", [None, torch.arange(200) // 5], ids=["GCV", "groups"])
def test_equal_errors_go_to_the_larger_alpha(groups):
    x, _ = problem()
    constant = torch.full((200, 1), 7.0, dtype=torch.float64)
    for alphas in (ALPHAS, ALPHAS[::-1]):
        fitted = StreamingRidgeCV(alphas).fit(x, constant, groups=groups)
        assert fitted.alpha_ == max(ALPHAS) and not fitted.coef_.any()


@given(
    cuts=st.lists(st.integers(1, 119), max_size=6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    weighted=st.booleans(),
    grouped=st.booleans(),
    d=st.sampled_from([5, 150]),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_split_into_batches_gives_the_same(cuts, dtype, weighted, grouped, d):
    x, y = (t.to(dtype) for t in problem(120, d))
    weight = torch.rand(120) + 0.5 if weighted else None
    groups = [f"document {i // 7}" for i in range(120)] if grouped else None
    whole = StreamingRidgeCV((0.01, 1.0)).fit(x, y, weight, groups)
    parts, edges = StreamingRidgeCV((0.01, 1.0)), sorted({0, 120, *cuts})
    for a, b in zip(edges, edges[1:], strict=False):
        parts.partial_fit(x[a:b], y[a:b], None if weight is None else weight[a:b], None if groups is None else groups[a:b])
    # centring by batch in float32 rounds otherwise
    tolerance = 1e-8 if dtype == torch.float64 or d == 150 else 2e-4
    np.testing.assert_allclose(
        parts.cv_results_["mean_squared_error"], whole.cv_results_["mean_squared_error"], rtol=tolerance
    )
    np.testing.assert_allclose(parts.coef_, whole.coef_, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("d", [12, 400])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_weight_of_two_is_the_row_twice(d, grouped):
    x, y = problem(100, d)
    twice = torch.arange(100) % 3 == 0
    doubled = torch.cat([torch.arange(100), twice.nonzero()[:, 0]])
    groups = torch.arange(100) // 4
    weighted = StreamingRidgeCV(ALPHAS).fit(x, y, 1.0 + twice, groups if grouped else None)
    repeated = StreamingRidgeCV(ALPHAS).fit(x[doubled], y[doubled], groups=groups[doubled] if grouped else None)
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, rtol=1e-6, atol=1e-9)
    if grouped or d == 12:
        errors = (fitted.cv_results_["mean_squared_error"] for fitted in (weighted, repeated))
        np.testing.assert_allclose(next(errors), next(errors), rtol=1e-7)


def test_folds_are_the_same_everywhere_and_do_not_depend_on_order():
    names = np.array(["a", "b", "a", "text 3", "b"])
    fold = fold_of(names, 4)
    assert fold[0] == fold[2] and fold[1] == fold[4]
    assert fold.tolist() == fold_of(names.tolist(), 4).tolist() == fold_of(names[::-1].copy(), 4).flip(0).tolist()
    assert fold_of(torch.arange(8), 5).tolist() == [4, 0, 0, 1, 2, 2, 1, 0]
    assert fold_of([3, 4], 7).tolist() == fold_of(["3", "4"], 7).tolist()
    with pytest.raises(ValueError, match="expected one integer or string per row"):
        fold_of(np.ones((3, 2)), 2)


def test_wrong_use_is_refused():
    x, y = problem()
    groups = torch.arange(200)
    fitted = StreamingRidgeCV().partial_fit(x, y, groups=groups)
    with pytest.raises(ValueError, match="with every batch or with none"):
        fitted.partial_fit(x, y)
    with pytest.raises(ValueError, match="fall into 1 of 5 folds"):
        StreamingRidgeCV().fit(x, y, groups=torch.zeros(200, dtype=torch.int64))
    with pytest.raises(ValueError, match="groups has 3 entries, expected one for each of 200 rows"):
        StreamingRidgeCV().fit(x, y, groups=[1, 2, 3])
    with pytest.raises(ValueError, match="alphas is empty"):
        StreamingRidgeCV(()).fit(x, y)
    with pytest.raises(ValueError, match="alpha=-1.0"):
        StreamingRidgeCV((1.0, -1.0)).fit(x, y)
    with pytest.raises(ValueError, match="n_folds=1: expected at least 2"):
        StreamingRidgeCV(n_folds=1).fit(x, y, groups=groups)
    with pytest.raises(ValueError, match="no use for groups"):
        StreamingRidge().fit(x, y, groups=groups)


def test_a_chosen_alpha_below_the_floor_is_raised_with_a_warning():
    x, _ = problem()
    x = torch.cat([x, x[:, :2]], 1)
    exact = x @ torch.randn(14, 2, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match=r"raised to the floor .*cond\(S\).*of 14, \d+ negative eigenvalues"):
        fitted = StreamingRidgeCV((1e-18,)).fit(x, exact)
    assert fitted.penalty_ > 1e-18 * np.trace(fitted.moments_.S.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # only the alpha that is used is worth a warning
        StreamingRidgeCV((1e-18, 1.0), n_folds=2).fit(x, torch.ones(200, 1, dtype=torch.float64), groups=torch.arange(200))


def test_batches_of_a_loader_and_dropped_rows():
    x, y = problem()
    x[3, 1], y[70, 0] = torch.nan, torch.inf
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32)
    with pytest.raises(ValueError, match="1 of 32 rows hold NaN or infinity, the first is row 3"):
        StreamingRidgeCV().fit(loader)
    good = x.isfinite().all(1) & y.isfinite().all(1)
    streamed, clean = StreamingRidgeCV(ALPHAS, nan="drop").fit(loader), StreamingRidgeCV(ALPHAS).fit(x[good], y[good])
    assert streamed.n_samples_seen_ == 198 and streamed.moments_.rows == 198
    np.testing.assert_allclose(streamed.coef_, clean.coef_, rtol=1e-9)
    late = StreamingRidgeCV(ALPHAS, nan="drop").partial_fit(x[3:4], y[3:4])
    with pytest.raises(ValueError, match="no rows"):
        late.predict(x[good])
    np.testing.assert_allclose(late.partial_fit(x, y).coef_, clean.coef_, rtol=1e-9)
    by_document = StreamingRidgeCV(ALPHAS).fit((x[i : i + 1], y[i : i + 1], None, [i]) for i in range(80, 200))
    np.testing.assert_allclose(by_document.coef_, StreamingRidgeCV(ALPHAS).fit(x[80:], y[80:], groups=range(80, 200)).coef_)
    with pytest.raises(ValueError, match="over before the first"):
        StreamingRidgeCV().fit(iter([]))


@pytest.mark.filterwarnings("ignore:Estimator StreamingRidgeCV does not inherit")
@parametrize_with_checks(
    [StreamingRidgeCV(), StreamingRidgeCV((1e-6, 1e-2), "none", fit_intercept=False, alpha_per_target=True)]
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)
