"""log Σ exp of rows of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from chassis_kernels.reference.precision import compute_dtype, without_autocast


@without_autocast
def log_sums(logits: Tensor, temperature: float) -> Tensor:
    """log Σ_v exp(z[n, v] / τ), [N]; -inf for a row of -inf alone, or of no columns."""
    return torch.logsumexp(logits.to(compute_dtype(logits)) / temperature, 1)
