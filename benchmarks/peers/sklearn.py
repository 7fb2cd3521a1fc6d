"""scikit-learn's Ridge by Cholesky, on the same numbers as numpy arrays."""

from __future__ import annotations

import torch

from benchmarks.cases import Case, Provider, simple
from benchmarks.ops.ridge import ALPHA

NAME, MODULE, OPS = "scikit-learn", "sklearn", ("ridge",)


def provide(case: Case, device: str) -> Provider | str:
    """Fits the [N, V] targets where there is an unembedding, as one would."""
    if device != "cpu":
        return "runs on CPUs alone"
    from sklearn.linear_model import Ridge

    def fit(x, h, head):
        targets = h if head is None else h @ head.T
        return torch.from_numpy(Ridge(ALPHA, solver="cholesky").fit(x.numpy(), targets.numpy()).coef_.T)

    return simple(fit)
