"""Streamed principal components are those of all rows at once: same subspaces, variances and signs for any split."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA
from sklearn.utils.estimator_checks import parametrize_with_checks

from chassis_kernels import StreamingPCA


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rows(n=400, d=10, dtype=torch.float64):
    """Variances that fall by a factor of two from axis to axis, far from the origin."""
    return (torch.randn(n, d, dtype=torch.float64) * 2 ** (-torch.arange(d) / 2) + 30).to(dtype) @ torch.linalg.qr(
        torch.randn(d, d, dtype=torch.float64)
    )[0].to(dtype)


@pytest.mark.parametrize(("n", "d"), [(400, 10), (40, 90)], ids=["primal", "dual"])
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("whiten", [False, True])
def test_equals_scikit_learns_full_pca(n, d, k, whiten):
    x = rows(n, d)
    ours = StreamingPCA(k, whiten).partial_fit(x[: n // 3]).partial_fit(x[n // 3 :])
    theirs = PCA(k, whiten=whiten, svd_solver="full").fit(x.numpy())
    # float64 rounding of S, |x|^2 n eps ~ 1e-10, over the gaps of its spectrum
    assert np.max(subspace_angles(ours.components_.T, theirs.components_.T)) < 1e-8
    for name in ("explained_variance_", "explained_variance_ratio_", "singular_values_", "mean_"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-8, err_msg=name)
    np.testing.assert_allclose(ours.components_, theirs.components_, atol=1e-8)  # signs too: largest entry positive
    codes = ours.transform(x)
    np.testing.assert_allclose(codes, theirs.transform(x.numpy()), atol=1e-6)
    np.testing.assert_allclose(
        ours.inverse_transform(codes), theirs.inverse_transform(theirs.transform(x.numpy())), atol=1e-7
    )
    assert ours.n_components_ == k and isinstance(codes, torch.Tensor)


@given(
    cuts=st.lists(st.integers(1, 299), max_size=8),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    weighted=st.booleans(),
    d=st.sampled_from([1, 9, 350]),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_split_into_batches_gives_the_same(cuts, dtype, weighted, d):
    x = rows(300, d, dtype)
    weight = torch.rand(300, dtype=torch.float64) + 0.5 if weighted else torch.ones(300, dtype=torch.float64)
    parts, edges = StreamingPCA(min(3, d)), sorted({0, 300, *cuts})
    for a, b in zip(edges, edges[1:], strict=False):
        parts.partial_fit(x[a:b], sample_weight=weight[a:b] if weighted else None)
    exact = x.double() - (weight @ x.double()) / weight.sum()
    covariance = (exact * weight[:, None]).T @ exact / (weight.sum() - 1)
    values, vectors = torch.linalg.eigh(covariance)
    k = parts.n_components_
    tolerance = 1e-8 if dtype == torch.float64 or d == 350 else 1e-3  # products in float32
    assert np.max(subspace_angles(parts.components_.T, vectors[:, -k:].numpy())) < tolerance
    np.testing.assert_allclose(parts.explained_variance_, values.flip(0)[:k], rtol=tolerance)


def test_a_share_of_the_variance_picks_as_many_components_as_reach_it():
    x = rows()
    for share in (0.3, 0.5, 0.9, 0.999):
        assert StreamingPCA(share).fit(x).n_components_ == PCA(share, svd_solver="full").fit(x.numpy()).n_components_


def test_all_components_give_the_rows_back_and_whitened_ones_unit_variance():
    x = rows()
    everything = StreamingPCA().fit(x)
    torch.testing.assert_close(everything.inverse_transform(everything.transform(x)), x, rtol=1e-10, atol=1e-10)
    white = StreamingPCA(whiten=True).fit(x)
    torch.testing.assert_close(white.transform(x).T.cov(), torch.eye(10, dtype=torch.float64), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(white.inverse_transform(white.transform(x)), x, rtol=1e-9, atol=1e-9)
    constant = StreamingPCA(whiten=True).fit(torch.ones(5, 3))
    assert not constant.transform(torch.ones(2, 3)).any() and not constant.explained_variance_ratio_.any()


def test_numbers_of_components_that_cannot_be_are_refused():
    x = rows(20)
    for wanted in (0, 11, 2.5, -0.5):
        with pytest.raises(ValueError, match=f"n_components={wanted}: expected None, a share between 0 and 1, or .* to 10"):
            StreamingPCA(wanted).fit(x)
    with pytest.raises(ValueError, match="number from 1 to 5"):
        StreamingPCA(6).fit(x[:6])  # six centred rows have rank five
    with pytest.raises(ValueError, match="n_samples=1"):
        StreamingPCA().fit(x[:1])
    with pytest.raises(ValueError, match="1 of 20 rows hold NaN"):
        StreamingPCA().fit(x.where(x != x[3, 3], torch.nan))
    loader = torch.utils.data.DataLoader(x, batch_size=7)
    np.testing.assert_allclose(StreamingPCA().fit(loader).components_, StreamingPCA().fit(x).components_, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Estimator StreamingPCA does not inherit")
@parametrize_with_checks([StreamingPCA(), StreamingPCA(2, whiten=True), StreamingPCA(0.9)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)
