"""torch.nn.functional.linear_cross_entropy with the expert's probabilities as target: KL = cross entropy - entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.cases import Case, Provider, simple

NAME, MODULE, OPS = "linear_cross_entropy", "torch", ("linear_kl",)


def provide(case: Case, device: str) -> Provider | str:
    """One of the two heads is fused; the other's [N, V] probabilities are the target."""
    if case.shape["r"]:
        return "has no gradients for a low-rank change"
    if not hasattr(F, "linear_cross_entropy"):
        return f"is not in torch {torch.__version__}"

    def kl(h_a, W_a, h_b, W_b):
        log_b = (h_b @ W_b.T).log_softmax(1)
        p = log_b.exp()
        return F.linear_cross_entropy(h_a, W_a, p, reduction="none") + (p * log_b).sum(1)

    return simple(kl)
