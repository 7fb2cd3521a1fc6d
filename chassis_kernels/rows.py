"""Batches of rows on their way into moments: the checks, and the waiting room for small batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from chassis_kernels.backends import DTYPE_CODES
from chassis_kernels.reference.precision import compute_dtype

PENDING_ROWS = 1024
PENDING_BYTES = 32 << 20

Batch = tuple[Tensor, Tensor | None, Tensor | None]  # x [N, D], y [N, T], weight [N]


def checked_layers(
    x: Sequence[Tensor],
    y: Sequence[Tensor | None],
    weight: Tensor | None,
    mask: Tensor | None,
    *,
    widths: Sequence[tuple[int, int]],
    device: torch.device,
) -> tuple[list[Batch], Tensor | None]:
    """A batch for each layer, without gradients, and which rows count (None: all); ValueError for what does not fit."""
    n = len(x[0]) if x[0].dim() else 0
    for of_x, of_y, width in zip(x, y, widths, strict=True):
        if (of_y is None) != (width[1] == 0):
            raise ValueError(f"these moments have dim_y={width[1]}, but y is {'missing' if of_y is None else 'given'}")
        for name, rows, columns in (("x", of_x, width[0]), ("y", of_y, width[1])):
            if rows is not None and (rows.shape != (n, columns) or rows.dtype not in DTYPE_CODES):
                raise ValueError(
                    f"{name} is {rows.dtype} {tuple(rows.shape)}, expected floats of shape ({n}, {columns}); "
                    "flatten leading dimensions with .flatten(0, -2)"
                )
    for name, values in (("weight", weight), ("mask", mask)):
        if values is not None and values.shape != (n,):
            raise ValueError(f"{name} has shape {tuple(values.shape)}, expected ({n},), one value per row")
    devices = {t.device for t in (*x, *y, weight, mask) if t is not None}
    if len(devices) > 1 or x[0].device.type != device.type:
        raise ValueError(f"inputs are on {', '.join(sorted(map(str, devices)))}, these moments on {device}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}, expected torch.bool; numbers go into weight")
    kept = mask
    if weight is not None:
        weight = weight.detach().to(compute_dtype(*x, *y))
        if not ((weight >= 0) & weight.isfinite()).all():
            raise ValueError("weights must be finite and not negative")
        kept = weight != 0 if mask is None else mask & (weight != 0)
    pairs = zip(once_each(Tensor.detach, x), once_each(Tensor.detach, y), strict=True)
    return [(of_x, of_y, weight) for of_x, of_y in pairs], kept


def checked(x, y, weight, mask, *, widths: tuple[int, int], device: torch.device) -> tuple[Batch, Tensor | None]:
    """`checked_layers` for one."""
    [batch], kept = checked_layers([x], [y], weight, mask, widths=[widths], device=device)
    return batch, kept


def once_each(function: Callable, tensors: Sequence[Tensor | None]) -> list:
    """function(t) for each of the tensors, called once for one that comes several times; None stays None."""
    found: dict[int, Any] = {}
    for t in tensors:
        if t is not None and id(t) not in found:
            found[id(t)] = function(t)
    return [None if t is None else found[id(t)] for t in tensors]


def not_finite(rows: Tensor) -> Tensor:
    """[N] bool: rows holding NaN or infinity. Sums are cheap and miss none; only where they overflow every value is read."""
    # Asked for another dtype torch would convert all rows first; float16 alone has too small a range for its sums.
    bad = ~rows.sum(1, dtype=torch.float32 if rows.dtype == torch.float16 else None).isfinite()
    if bad.any():
        bad[bad.clone()] = ~rows[bad].isfinite().all(1)
    return bad


def screened(batches: Sequence[Batch], kept: Tensor | None, nan: str) -> list[tuple[Tensor | None, int]]:
    """For each batch which rows count without those that are not finite, and how many those are; with nan="raise" they are a
    ValueError."""
    if nan not in ("raise", "drop"):
        raise ValueError(f'nan={nan!r}: expected "raise" or "drop"')
    x, y, _ = zip(*batches, strict=True)
    found = []
    for bad, bad_y in zip(once_each(not_finite, x), once_each(not_finite, y), strict=True):
        if bad_y is not None:
            bad = bad | bad_y
        if kept is not None:
            bad = bad & kept
        n_bad = int(bad.sum())
        if n_bad and nan == "raise":
            raise ValueError(
                f"{n_bad} of {len(bad)} rows hold NaN or infinity, the first is row {int(bad.nonzero()[0])}: repair them, "
                'mask them out, or pass nan="drop" to leave them out and count them'
            )
        found.append((kept if n_bad == 0 else ~bad if kept is None else kept & ~bad, n_bad))
    return found


def selected(batch: Batch, kept: Tensor | None) -> Batch:
    """The rows that count; without a mask the batch itself."""
    x, y, weight = (t if t is None or kept is None else t[kept] for t in batch)
    return x, y, weight


def zero_weighted(batches: Sequence[Batch], kept: Sequence[Tensor | None]) -> list[Batch]:
    """The batches themselves, with weight 0 for the rows that do not count."""
    weight = batches[0][2]
    weights = once_each(lambda k: k.float() if weight is None else torch.where(k, weight, 0.0), kept)
    return [(x, y, weight if own is None else own) for (x, y, _), own in zip(batches, weights, strict=True)]


def capacity(batch: Batch) -> int:
    """How many rows like these are worth a merge: reading all of S and C costs as much as multiplying some hundred."""
    row_bytes = sum(t.shape[1] * t.element_size() for t in batch[:2] if t is not None)
    return max(1, min(PENDING_ROWS, PENDING_BYTES // row_bytes))


class Waiting:
    """Copies of the rows of small batches until they are worth a merge; the buffers are kept for the next ones."""

    def __init__(self) -> None:
        self._kind: tuple = ()
        self._buffers: Batch | None = None
        self._weighted = False
        self.n = 0

    @property
    def full(self) -> bool:
        return self.n > 0 and self.n == self._kind[0]

    def taken(self) -> Iterator[Batch]:
        """What waits, if anything does; nothing waits when the next is asked for."""
        if self.n:
            yield self.batch()
            self.n = 0

    def batch(self) -> Batch:
        """What waits (views)."""
        x, y, weight = (t if t is None else t[: self.n] for t in self._buffers)
        return x, y, weight if self._weighted else None

    def fits(self, batch: Batch) -> bool:
        """Whether these rows can join those that wait; when none wait they always can."""
        return self.n == 0 or (self._kind[1:] == _dtypes(batch) and self.n + len(batch[0]) <= self._kind[0])

    def add(self, batch: Batch) -> None:
        """Copy rows that fit."""
        x, y, weight = batch
        if self.n == 0:
            self._allocate(batch)
        place = slice(self.n, self.n + len(x))
        if weight is not None and not self._weighted:
            self._buffers[2][: self.n] = 1
            self._weighted = True
        self._buffers[0][place] = x
        if y is not None:
            self._buffers[1][place] = y
        if self._weighted:
            self._buffers[2][place] = 1 if weight is None else weight
        self.n = place.stop

    @torch.inference_mode(False)
    def _allocate(self, batch: Batch) -> None:
        x, y, _ = batch
        size = max(capacity(batch), len(x))
        if self._kind != (size, *_dtypes(batch)):
            buffer_y = None if y is None else y.new_empty(size, y.shape[1])
            self._buffers = x.new_empty(size, x.shape[1]), buffer_y, x.new_empty(size, dtype=compute_dtype(x, y))
            self._kind = (size, *_dtypes(batch))
        self._weighted = False


def _dtypes(batch: Batch) -> tuple[torch.dtype | None, ...]:
    return tuple(None if t is None else t.dtype for t in batch[:2])
