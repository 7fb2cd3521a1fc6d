"""log Σ exp of rows of logits, PART rows at a time: torch's own makes copies of what it is given."""

from __future__ import annotations

import torch
from torch import Tensor

from chassis_kernels.reference.precision import compute_dtype, without_autocast

PART = 64


@without_autocast
def log_sums(logits: Tensor, temperature: float) -> Tensor:
    """log Σ_v exp(z[n, v] / τ), [N]; -inf for a row of -inf alone, or of no columns."""
    dtype = compute_dtype(logits)
    return torch.cat([torch.logsumexp(part.to(dtype) / temperature, 1) for part in logits.split(PART)])
