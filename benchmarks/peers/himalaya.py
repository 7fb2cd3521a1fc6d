"""himalaya's ridge on its torch backend."""

from __future__ import annotations

import torch

from benchmarks.cases import Case, Provider, simple
from benchmarks.ops.ridge import ALPHA

NAME, MODULE, OPS = "himalaya", "himalaya", ("ridge",)


def provide(case: Case, device: str) -> Provider | str:
    """Fits the [N, V] targets where there is an unembedding, as one would."""
    from himalaya.backend import set_backend
    from himalaya.ridge import Ridge

    set_backend("torch_cuda" if device == "cuda" else "torch")

    def fit(x, h, head):
        targets = h if head is None else h @ head.T
        return torch.as_tensor(Ridge(alpha=ALPHA, fit_intercept=True).fit(x, targets).coef_)

    return simple(fit)
