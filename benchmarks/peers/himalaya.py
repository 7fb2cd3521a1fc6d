"""himalaya's ridge on its torch backend."""

from __future__ import annotations

import torch

from benchmarks.cases import Case, Provider, simple
from benchmarks.ops import ridge, ridge_cv

NAME, MODULE, OPS = "himalaya", "himalaya", ("ridge", "ridge_cv")


def provide(case: Case, device: str) -> Provider | str:
    """Fits the [N, V] targets where there is an unembedding, as one would; cross-validates over the same folds."""
    from himalaya.backend import set_backend

    set_backend("torch_cuda" if device == "cuda" else "torch")
    return _ridge(case) if case.op == "ridge" else _ridge_cv(case)


def _ridge(case: Case) -> Provider | str:
    if case.shape.get("alpha") == 0:
        return "is for a penalty above 0"
    from himalaya.ridge import Ridge

    def fit(x, h, head):
        targets = h if head is None else h @ head.T
        return torch.as_tensor(Ridge(alpha=ridge.ALPHA, fit_intercept=True).fit(x, targets).coef_)

    return simple(fit)


def _ridge_cv(case: Case) -> Provider | str:
    if case.shape["form"] == "GCV":
        return "has no generalised cross-validation"
    from himalaya.ridge import RidgeCV
    from sklearn.model_selection import PredefinedSplit

    cv = PredefinedSplit(ridge_cv.folds(case.shape["N"]).numpy())

    def fit(x, y):
        alphas = torch.tensor(ridge_cv.ALPHAS, dtype=x.dtype)
        model = RidgeCV(alphas, fit_intercept=True, cv=cv, solver_params={"local_alpha": False})
        return torch.as_tensor(model.fit(x, y).coef_)

    return simple(fit, of=lambda full: full[:1])
