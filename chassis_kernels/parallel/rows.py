"""Rows of sharded logits, a tile at a time: softmax statistics over the whole vocabulary, sums by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from chassis_kernels.parallel.groups import Parallel
from chassis_kernels.reference import projection_kl as reference

TILE = {"cpu": 1 << 16}  # values of a tile: a few of them stay in a core's cache
LARGE_TILE = 1 << 24  # elsewhere: enough to fill a device
Rows = Tensor | slice  # row numbers [n] int64, or consecutive rows


class RowStats(NamedTuple):
    """Of rows of logits z over the whole vocabulary: m = max z and Σ exp((z - m) / τ)."""

    max: Tensor  # [N]
    sum: Tensor  # [N]

    def log_softmax(self, z: Tensor, rows: Rows, temperature: float) -> Tensor:
        """log_softmax(z / τ) of the rows [n] whose logits, or a slab of them, are z [n, W]."""
        return (z - self.max[rows, None]) / temperature - self.sum[rows, None].log()

    def softmax(self, z: Tensor, rows: Rows, temperature: float) -> Tensor:
        return ((z - self.max[rows, None]) / temperature).exp() / self.sum[rows, None]


def tiles(rows: Tensor, width: int) -> Iterator[Rows]:
    """The row numbers [N] in tiles of at most TILE values of `width`, at least one row.

    On a CPU consecutive rows come as a slice: reading them makes no copy. Elsewhere asking would wait for the device.
    """
    step = max(1, TILE.get(rows.device.type, LARGE_TILE) // max(1, width))
    for tile in rows.split(step) if len(rows) else ():
        consecutive = rows.device.type == "cpu" and bool((tile.diff() == 1).all())
        yield slice(int(tile[0]), int(tile[-1]) + 1) if consecutive else tile


def block(rows: Rows, columns: Rows) -> tuple[Rows, Rows]:
    """The index of all these columns in all these rows."""
    return (rows, columns) if isinstance(rows, slice) or isinstance(columns, slice) else (rows[:, None], columns)


def row_stats(
    logits: Tensor,  # [N, W]
    rows: Tensor,  # [n] int64
    temperature: float,
    dtype: torch.dtype,
    parallel: Parallel,
    columns: Rows = slice(None),
) -> RowStats:
    """Of the rows `rows` of logits within columns, [N]; 0 and 1 for the other rows."""
    best = torch.zeros(len(logits), dtype=dtype, device=logits.device)
    total = torch.ones_like(best)
    best[rows], total[rows] = -torch.inf, 0.0
    width = logits.shape[1] if isinstance(columns, slice) else len(columns)
    for tile in tiles(rows, width) if width else ():
        z = logits[block(tile, columns)].to(dtype)
        best[tile] = own = z.amax(1)
        total[tile] = ((z - torch.where(own == -torch.inf, 0.0, own)[:, None]) / temperature).exp().sum(1)
    if parallel.vocab_shards == 1:
        return RowStats(best, total)
    overall = parallel.vocab_max(best)
    kept = torch.where(best == -torch.inf, 0.0, ((best - overall) / temperature).exp() * total)
    return RowStats(overall, torch.ones_like(total).index_copy(0, rows, parallel.vocab_sum(kept)[rows]))


def top_columns(teacher: Tensor, keep: Tensor | None, k: int, dtype: torch.dtype, parallel: Parallel) -> Tensor:
    """`reference.top_columns` over the rows [N, V_t] of all sequence ranks."""
    best = torch.full((teacher.shape[1],), -torch.inf, dtype=dtype, device=teacher.device)
    rows = torch.arange(len(teacher), device=teacher.device) if keep is None else keep.nonzero()[:, 0]
    for tile in tiles(rows, teacher.shape[1]):
        best = torch.maximum(best, teacher[tile].amax(0).to(dtype))
    return reference.top_columns(parallel.sequence_max(best)[None], None, k)
