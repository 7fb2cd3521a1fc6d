"""The dtype in which the references calculate: float64 if any input is, else float32, whatever autocast says."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 when one of the tensors is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def without_autocast(function: Callable) -> Callable:
    """Run `function` with autocast off: an op reached under autocast must not have its own products rounded."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        device = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run
