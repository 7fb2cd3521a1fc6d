"""scikit-learn's Ridge by Cholesky, RidgeCV and PCA, on the same numbers as numpy arrays."""

from __future__ import annotations

import torch

from benchmarks.cases import Case, Provider, simple
from benchmarks.ops import ridge, ridge_cv

NAME, MODULE, OPS = "scikit-learn", "sklearn", ("ridge", "ridge_cv", "pca")


def provide(case: Case, device: str) -> Provider | str:
    """Fits the [N, V] targets where there is an unembedding, as one would."""
    if device != "cpu":
        return "runs on CPUs alone"
    return {"ridge": _ridge, "ridge_cv": _ridge_cv, "pca": _pca}[case.op](case)


def _ridge(case: Case) -> Provider:
    from sklearn.linear_model import Ridge

    alpha = case.shape.get("alpha", ridge.ALPHA)

    def fit(x, h, head):
        targets = h if head is None else h @ head.T
        return torch.from_numpy(Ridge(alpha, solver="cholesky").fit(x.numpy(), targets.numpy()).coef_.T)

    return simple(fit)


def _ridge_cv(case: Case) -> Provider | str:
    """Chooses by exact leave-one-out errors: the same penalty, and of other errors than ours the coefficients alone."""
    if case.shape["form"] != "GCV":
        return "refits every penalty and fold through GridSearchCV"
    if case.shape["N"] * case.shape["T"] > 1 << 20:
        return "holds [N, T] errors for each penalty: minutes at this size"
    from sklearn.linear_model import RidgeCV

    def fit(x, y):
        return torch.from_numpy(RidgeCV(ridge_cv.ALPHAS).fit(x.numpy(), y.numpy()).coef_.T)

    return simple(fit, of=lambda full: full[:1])


def _pca(case: Case) -> Provider:
    """Centres its float32 products after they are summed: timed with the error that costs."""
    from sklearn.decomposition import PCA

    return simple(lambda x: PCA(case.shape["k"]).fit(x.numpy()), read=components, approximate=True)


def components(fitted, x) -> tuple[torch.Tensor, torch.Tensor]:
    """The projection onto the components of a fitted estimator, and their variances."""
    axes = torch.as_tensor(fitted.components_).double()
    return axes.T @ axes, torch.as_tensor(fitted.explained_variance_)
