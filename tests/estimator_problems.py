"""Estimators and batches of rows for the tests of state and of process groups."""

import torch

from chassis_kernels import (
    ConceptErasure,
    ReducedRankRegression,
    StreamingCCA,
    StreamingPCA,
    StreamingRidge,
    StreamingRidgeCV,
)

ALPHAS = (1e-4, 1e-2, 1.0)
ESTIMATORS = {
    "ridge": (lambda: StreamingRidge(0.01), {}),
    "ridge, weighted": (lambda: StreamingRidge(0.01, fit_intercept=False), {"weighted": True}),
    "ridge, fewer rows than columns": (lambda: StreamingRidge(0.01), {"d": 130}),
    "ridge, rows then moments": (lambda: StreamingRidge(0.01), {"d": 50}),
    "ridge cv": (lambda: StreamingRidgeCV(ALPHAS), {}),
    "ridge cv by group": (lambda: StreamingRidgeCV(ALPHAS, n_folds=3), {"grouped": True}),
    "ridge cv by group, fewer rows than columns": (lambda: StreamingRidgeCV(ALPHAS, n_folds=3), {"grouped": True, "d": 130}),
    "ridge cv per target": (lambda: StreamingRidgeCV(ALPHAS, alpha_per_target=True), {}),
    "reduced rank": (lambda: ReducedRankRegression(2), {}),
    "pca": (lambda: StreamingPCA(3), {"y": False}),
    "pca, fewer rows than columns": (lambda: StreamingPCA(3, whiten=True), {"y": False, "d": 130}),
    "cca": (lambda: StreamingCCA(2), {}),
    "erasure": (lambda: ConceptErasure(3), {"classes": True}),
}
SIZES = (18, 1, 40, 10, 50)


def batches(*, d=9, y=True, weighted=False, grouped=False, classes=False, dtype=torch.float32) -> list[tuple]:
    """Arguments of `partial_fit`, by SIZES."""
    g, n = torch.Generator().manual_seed(0), sum(SIZES)
    x = torch.randn(n, d, generator=g) * torch.linspace(1, 5, d) + 3
    targets = x[:, :3] @ torch.randn(3, 4, generator=g) + torch.randn(n, 4, generator=g)
    if classes:
        targets = torch.randint(3, (n,), generator=g)
    everything = (
        x.to(dtype),
        targets.to(dtype) if y else None,
        torch.rand(n, generator=g) if weighted else None,
        torch.arange(n) // 3 if grouped else None,
    )
    cut = [(None,) * len(SIZES) if t is None else t.split(SIZES) for t in everything]
    return list(zip(*cut, strict=True))


def joined(parts: list[tuple]) -> tuple:
    """One batch of several."""
    return tuple(None if ts[0] is None else torch.cat(ts) for ts in zip(*parts, strict=True))


def outcome(estimator, x: torch.Tensor) -> torch.Tensor:
    """What the fit says of rows x."""
    return (estimator.predict if hasattr(estimator, "predict") else estimator.transform)(x)
