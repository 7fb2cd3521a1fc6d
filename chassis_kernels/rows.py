"""Batches of rows on their way into moments: the checks, and the waiting room for small batches."""

from __future__ import annotations

import torch
from torch import Tensor

from chassis_kernels.backends import DTYPE_CODES
from chassis_kernels.reference.precision import compute_dtype

PENDING_ROWS = 1024
PENDING_BYTES = 32 << 20

Batch = tuple[Tensor, Tensor | None, Tensor | None]  # x [N, D], y [N, T], weight [N]


def checked(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    mask: Tensor | None,
    *,
    widths: tuple[int, int],
    device: torch.device,
) -> tuple[Batch, Tensor | None]:
    """The batch without gradients, and which of its rows count (None: all); ValueError for what does not fit."""
    if (y is None) != (widths[1] == 0):
        raise ValueError(f"these moments have dim_y={widths[1]}, but y is {'missing' if y is None else 'given'}")
    n = len(x) if x.dim() else 0
    for name, rows, width in (("x", x, widths[0]), ("y", y, widths[1])):
        if rows is not None and (rows.shape != (n, width) or rows.dtype not in DTYPE_CODES):
            raise ValueError(
                f"{name} is {rows.dtype} {tuple(rows.shape)}, expected floats of shape ({n}, {width}); "
                "flatten leading dimensions with .flatten(0, -2)"
            )
    for name, values in (("weight", weight), ("mask", mask)):
        if values is not None and values.shape != (n,):
            raise ValueError(f"{name} has shape {tuple(values.shape)}, expected ({n},), one value per row")
    devices = {t.device for t in (x, y, weight, mask) if t is not None}
    if len(devices) > 1 or x.device.type != device.type:
        raise ValueError(f"inputs are on {', '.join(sorted(map(str, devices)))}, these moments on {device}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}, expected torch.bool; numbers go into weight")
    kept = mask
    if weight is not None:
        weight = weight.detach().to(compute_dtype(x, y))
        if not ((weight >= 0) & weight.isfinite()).all():
            raise ValueError("weights must be finite and not negative")
        kept = weight != 0 if mask is None else mask & (weight != 0)
    return (x.detach(), None if y is None else y.detach(), weight), kept


def not_finite(rows: Tensor) -> Tensor:
    """[N] bool: rows holding NaN or infinity. Sums are cheap and miss none; only where they overflow every value is read."""
    bad = ~rows.sum(1, dtype=torch.float64 if rows.dtype == torch.float64 else torch.float32).isfinite()
    if bad.any():
        bad[bad.clone()] = ~rows[bad].isfinite().all(1)
    return bad


def selected(batch: Batch, kept: Tensor | None) -> Batch:
    """A copy of the rows that count."""
    return tuple(t if t is None else t.clone() if kept is None else t[kept] for t in batch)


def zero_weighted(batch: Batch, kept: Tensor | None) -> Batch:
    """The batch itself, with weight 0 for the rows that do not count."""
    x, y, weight = batch
    if kept is None:
        return batch
    return x, y, kept.float() if weight is None else torch.where(kept, weight, 0.0)


def joined(batches: list[Batch]) -> Batch:
    """One batch of all rows; if any has weights, the others weigh 1."""
    xs, ys, weights = zip(*batches, strict=True)
    dtype = next((w.dtype for w in weights if w is not None), None)
    if dtype is not None:
        weights = [x.new_ones(len(x), dtype=dtype) if w is None else w for x, w in zip(xs, weights, strict=True)]
    return torch.cat(xs), None if ys[0] is None else torch.cat(ys), None if dtype is None else torch.cat(weights)


def ready(batches: list[Batch]) -> bool:
    """Whether these rows are worth a merge: reading all of S and C costs as much as multiplying some hundred rows."""
    n_bytes = sum(t.nbytes for batch in batches for t in batch if t is not None)
    return n_bytes >= PENDING_BYTES or sum(len(batch[0]) for batch in batches) >= PENDING_ROWS


def same_dtypes(a: Batch, b: Batch) -> bool:
    """Whether x and y of two batches can be joined without a cast."""
    return all(s is t is None or s.dtype == t.dtype for s, t in zip(a[:2], b[:2], strict=True))
