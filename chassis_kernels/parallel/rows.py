"""Rows of sharded logits, a tile at a time: softmax statistics over the whole vocabulary, sums by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from chassis_kernels.parallel.groups import Parallel
from chassis_kernels.reference import projection_kl as reference

TILE = 1 << 20  # values of a tile: what a stage may hold besides its inputs and outputs


class RowStats(NamedTuple):
    """Of rows of logits z over the whole vocabulary: m = max z and Σ exp((z - m) / τ)."""

    max: Tensor  # [N]
    sum: Tensor  # [N]

    def log_softmax(self, z: Tensor, rows: Tensor, temperature: float) -> Tensor:
        """log_softmax(z / τ) of the rows [n] whose logits, or a slab of them, are z [n, W]."""
        return (z - self.max[rows, None]) / temperature - self.sum[rows, None].log()

    def softmax(self, z: Tensor, rows: Tensor, temperature: float) -> Tensor:
        return ((z - self.max[rows, None]) / temperature).exp() / self.sum[rows, None]


def tiles(rows: Tensor, width: int) -> Iterator[Tensor]:
    """The row numbers [N] in tiles of at most TILE values of `width`, at least one row."""
    return iter(rows.split(max(1, TILE // max(1, width)))) if len(rows) else iter(())


def take(logits: Tensor, rows: Tensor, columns: Tensor | slice) -> Tensor:
    """A copy of the block logits[rows, columns]."""
    return logits[rows, columns] if isinstance(columns, slice) else logits[rows[:, None], columns]


def row_stats(
    logits: Tensor,  # [N, W]
    rows: Tensor,  # [n] int64
    temperature: float,
    dtype: torch.dtype,
    parallel: Parallel,
    columns: Tensor | slice = slice(None),
) -> RowStats:
    """Of the rows `rows` of logits within columns, [N]; 0 and 1 for the other rows."""
    best = torch.zeros(len(logits), dtype=dtype, device=logits.device)
    total = torch.ones_like(best)
    best[rows], total[rows] = -torch.inf, 0.0
    width = logits.shape[1] if isinstance(columns, slice) else len(columns)
    for tile in tiles(rows, width) if width else ():
        z = take(logits, tile, columns).to(dtype)
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
