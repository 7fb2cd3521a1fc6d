"""Canonical correlations from moments against their definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cross_decomposition import CCA
from sklearn.utils.estimator_checks import parametrize_with_checks

from chassis_kernels import StreamingCCA


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pairs(n=500, d=6, t=4, dtype=torch.float64):
    shared = torch.randn(n, 3, dtype=torch.float64) * torch.tensor([3.0, 1.0, 0.4], dtype=torch.float64)
    x, y = (shared @ torch.randn(3, w, dtype=torch.float64) + torch.randn(n, w, dtype=torch.float64) for w in (d, t))
    return (x + 7).to(dtype), (y * 3 - 2).to(dtype)


def definition(x, y):
    """Singular values of Q_xᵀ Q_y for orthonormal bases of the centred rows (Björck & Golub 1973)."""
    bases = [torch.linalg.qr(t.double() - t.double().mean(0))[0] for t in (x, y)]
    return torch.linalg.svdvals(bases[0].T @ bases[1])


def test_correlations_are_the_cosines_between_the_two_column_spaces():
    x, y = pairs()
    fitted = StreamingCCA().partial_fit(x[:100], y[:100]).partial_fit(x[100:], y[100:])
    np.testing.assert_allclose(fitted.canonical_correlations_, definition(x, y), rtol=1e-9)
    sides = fitted.transform(x, y)
    for scores in sides:
        torch.testing.assert_close(scores.T.cov(), torch.eye(4, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    cross = sides[0].T @ sides[1] / (len(x) - 1)
    torch.testing.assert_close(cross, torch.diag(torch.as_tensor(fitted.canonical_correlations_)), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(fitted.transform(x), sides[0])
    torch.testing.assert_close(sides[0], (x - torch.as_tensor(fitted.x_mean_)) @ torch.as_tensor(fitted.x_rotations_))
    torch.testing.assert_close(sides[1], (y - torch.as_tensor(fitted.y_mean_)) @ torch.as_tensor(fitted.y_rotations_))
    assert (fitted.x_rotations_.max(0) >= -fitted.x_rotations_.min(0)).all()


def test_agrees_with_scikit_learns_iterations():
    x, y = pairs()
    theirs = CCA(2, max_iter=5000, tol=1e-12).fit(x.numpy(), y.numpy())
    a, b = theirs.transform(x.numpy(), y.numpy())
    expected = [np.corrcoef(a[:, j], b[:, j])[0, 1] for j in range(2)]
    fitted = StreamingCCA(2).fit(x, y)
    np.testing.assert_allclose(fitted.canonical_correlations_, expected, rtol=1e-6)
    assert fitted.transform(x.numpy()).shape == (500, 2)


@given(
    cuts=st.lists(st.integers(1, 499), max_size=6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    d=st.integers(1, 7),
    t=st.integers(1, 7),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_split_into_batches_gives_the_same(cuts, dtype, d, t):
    x, y = pairs(500, d, t, dtype)
    parts, edges = StreamingCCA(), sorted({0, 500, *cuts})
    for a, b in zip(edges, edges[1:], strict=False):
        parts.partial_fit(x[a:b], y[a:b])
    np.testing.assert_allclose(
        parts.canonical_correlations_, definition(x, y), atol=1e-8 if dtype == torch.float64 else 1e-5
    )


def test_columns_that_repeat_count_once_and_alpha_shrinks():
    x, y = pairs()
    repeated = StreamingCCA().fit(torch.cat([x, x @ torch.randn(6, 2, dtype=torch.float64)], 1), y)
    np.testing.assert_allclose(repeated.canonical_correlations_, definition(x, y), rtol=1e-7)
    plain, shrunk = StreamingCCA().fit(x, y), StreamingCCA(alpha=1.0).fit(x, y)
    assert (shrunk.canonical_correlations_ < plain.canonical_correlations_).all()
    few = StreamingCCA().fit(x[:5], y[:5])
    np.testing.assert_allclose(few.canonical_correlations_, 1)
    weight = (torch.arange(500) % 3).double()
    doubled = StreamingCCA().fit(x.repeat_interleave(weight.long(), 0), y.repeat_interleave(weight.long(), 0))
    np.testing.assert_allclose(
        StreamingCCA().fit(x, y, weight).canonical_correlations_, doubled.canonical_correlations_, rtol=1e-9
    )


def test_wrong_use_is_refused():
    x, y = pairs()
    with pytest.raises(ValueError, match="X or y is constant"):
        StreamingCCA().fit(x, torch.ones(500, 2))
    with pytest.raises(ValueError, match="n_components=0"):
        StreamingCCA(0).fit(x, y)
    with pytest.raises(ValueError, match="alpha=-1.0"):
        StreamingCCA(alpha=-1).fit(x, y)
    with pytest.raises(ValueError, match="requires y"):
        StreamingCCA().fit(x)


@pytest.mark.filterwarnings("ignore:Estimator StreamingCCA does not inherit")
@parametrize_with_checks([StreamingCCA(), StreamingCCA(1, alpha=0.1)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)
