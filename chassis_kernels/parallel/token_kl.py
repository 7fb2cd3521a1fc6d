"""token_kl on sharded logits.

p over J    (max, Σ exp) over the slab's columns of J, then over the vocabulary ranks
KL          Σ q (log q - log p), or reverse Σ p (log p - log q): over the slab, then over the vocabulary ranks
dz          (p - q) / τ, or reverse p (log p - log q - KL) / τ
sums over positions: over the rank's, then over the sequence ranks
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from chassis_kernels.parallel.groups import ONE_RANK, Parallel
from chassis_kernels.parallel.rows import Rows, RowStats, block, row_stats, tiles, top_columns
from chassis_kernels.reference.precision import compute_dtype, without_autocast
from chassis_kernels.reference.projection_kl import times
from chassis_kernels.reference.token_kl import TOKENS_EPS


@without_autocast
def loss(
    student_logits: Tensor,  # [B, T, W], the rank's columns
    teacher_logits: Tensor,  # [B, T, >= V]
    mask: Tensor,  # [B, T]
    parallel: Parallel,
    *,
    temperature: float,
    vocab_topk: int | None,
    reverse: bool,
    n_tokens: Tensor | float,
    column_mask: Tensor | None,
) -> Tensor:
    """`chassis_kernels.token_kl` with `parallel`."""
    dtype, slab = compute_dtype(student_logits, teacher_logits), parallel.slab(student_logits)
    student = student_logits.flatten(0, 1)
    teacher = teacher_logits.detach()[..., : parallel.head(student_logits)].flatten(0, 1)
    mask = mask.flatten().to(dtype)
    columns = None
    if vocab_topk is not None:
        keep = None if column_mask is None else column_mask.flatten()
        columns = top_columns(teacher, keep, vocab_topk, dtype, parallel)
    kept = (mask != 0).nonzero()[:, 0]
    job = _Job(columns, slab, kept, float(temperature), reverse, dtype, parallel)
    kl = _TokenKL.apply(student, teacher, job)
    return temperature**2 * parallel.sequence_sum((mask * kl).sum()) / (n_tokens + TOKENS_EPS)


class _Job(NamedTuple):
    columns: Tensor | None  # [k] int64, J; None: all
    slab: range
    rows: Tensor  # [n] int64 that count
    temperature: float
    reverse: bool
    dtype: torch.dtype
    parallel: Parallel

    def own(self) -> tuple[Rows, Rows]:
        """The slab's columns of J, counted from its first, and of the teacher."""
        if self.columns is None:
            return slice(None), slice(self.slab.start, self.slab.stop)
        own = self.columns[(self.columns >= self.slab.start) & (self.columns < self.slab.stop)]
        return own - self.slab.start, own

    def tiles(self, student: Tensor, teacher: Tensor, stats: list[Tensor]) -> Iterator[tuple[Rows, Tensor, Tensor]]:
        """Rows, and their log-probabilities of student and teacher at the slab's columns of J."""
        p_stats, q_stats = RowStats(*stats[:2]), RowStats(*stats[2:])
        own, its = self.own()
        for tile in tiles(self.rows, len(self.slab)):
            z, y = student[block(tile, own)].to(self.dtype), teacher[block(tile, its)].to(self.dtype)
            yield tile, p_stats.log_softmax(z, tile, self.temperature), q_stats.log_softmax(y, tile, self.temperature)


class _TokenKL(torch.autograd.Function):
    """KL per row [N] within J, 0 in rows that do not count."""

    @staticmethod
    def forward(ctx, student, teacher, job):
        whole = slice(None) if job.columns is None else job.columns
        stats = (
            *row_stats(student, job.rows, job.temperature, job.dtype, job.parallel, job.own()[0]),
            *row_stats(teacher, job.rows, job.temperature, job.dtype, ONE_RANK, whole),
        )
        kl = torch.zeros_like(stats[0])
        for tile, log_p, log_q in job.tiles(student, teacher, stats):
            kl[tile] = (times(log_p.exp(), log_p - log_q) if job.reverse else times(log_q.exp(), log_q - log_p)).sum(1)
        kl = job.parallel.vocab_sum(kl)
        ctx.save_for_backward(student, teacher, kl, *stats)
        ctx.job = job
        return kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (student, teacher, kl, *stats), job = ctx.saved_tensors, ctx.job
        out, own = torch.zeros_like(student), job.own()[0]
        for tile, log_p, log_q in job.tiles(student, teacher, stats):
            p = log_p.exp()
            part = times(p, log_p - log_q - kl[tile, None]) if job.reverse else p - log_q.exp()
            part = (part * (grad[tile, None] / job.temperature)).to(out.dtype)
            out[block(tile, own)] = part
        return out, None, None
