"""torch.cov of all rows at once."""

from __future__ import annotations

import torch

from benchmarks.cases import Case, Provider, simple

NAME, MODULE, OPS = "torch.cov", "torch", ("moments",)


def provide(case: Case, device: str) -> Provider | str:
    """Held against the same sums of products: the covariance times N."""
    if case.shape["T"] or case.shape["batches"] > 1:
        return "has one matrix of rows: no batches, no targets apart"
    return simple(lambda x, y: torch.cov(x.float().T, correction=0), read=lambda found, x, y: (found.double() * len(x),))
