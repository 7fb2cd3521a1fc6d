"""gold_kl on sharded logits, a tile of chunks at a time.

    A_c     mean of log_softmax(z_s / τ), the slab's columns: over the rank's rows, then over the sequence ranks
    B_c     the same of the teacher, all columns
    common  over the slab's mapped tokens, then over the vocabulary ranks
    x       the m largest of each slab, gathered over the vocabulary ranks, and of those the m largest
    dz[t, s] = (D[s] - p_t[s] Σ D) / (count + ε) / τ      Σ D over the slab, then over the vocabulary ranks

A_c and B_c of one tile are all that is held: backward makes them again. Every sequence rank compares every chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from chassis_kernels.chunks import COUNT_EPS, Chunks, layout, only
from chassis_kernels.parallel.groups import ONE_RANK, Parallel
from chassis_kernels.parallel.rows import RowStats, row_stats, tiles
from chassis_kernels.reference.precision import compute_dtype, without_autocast
from chassis_kernels.reference.projection_kl import times
from chassis_kernels.sparse import SparseProjection

CHUNK_TILE = 1 << 20  # values of A_c and B_c together, over all slabs


@without_autocast
def loss(
    student_logits: Tensor,  # [B, T_s, W], the rank's columns
    teacher_logits: Tensor,  # [B, T_t, >= V_t]
    projection: SparseProjection,  # [V_s, V_t], whole
    chunks: Chunks,
    parallel: Parallel,
    *,
    temperature: float,
    uncommon_topk: int,
    reverse: bool,
    relaxed: bool,
    exact_only: bool,
    sample_mask: Tensor | None,
    denominator: Tensor | float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`chassis_kernels.gold_kl` with `parallel`."""
    dtype = compute_dtype(student_logits, teacher_logits)
    plan = layout(chunks, sample_mask, exact_only, dtype, parallel)
    number = plan.counted.sum()
    denominator = torch.as_tensor(number if denominator is None else denominator, dtype=dtype, device=number.device)
    student, slab = student_logits.flatten(0, 1), parallel.slab(student_logits)
    students, teachers = projection.exact_map(relaxed=relaxed)
    own = ((students >= slab.start) & (students < slab.stop)).nonzero()[:, 0]
    sizes = (size - len(students) for size in projection.shape)
    teacher = teacher_logits.detach()[..., : projection.n_teacher].flatten(0, 1)
    rows = (only(ids, plan.counted) for ids in (plan.student, plan.teacher))
    job = _Job(
        _Side.of(student, next(rows), plan.student_count, temperature, dtype, parallel),
        _Side.of(teacher, next(rows), plan.teacher_count, temperature, dtype, ONE_RANK),
        students[own] - slab.start,
        own,
        teachers,
        plan.counted,
        max(1, CHUNK_TILE // sum(projection.shape)),
        min(*sizes, uncommon_topk),
        temperature,
        reverse,
        parallel,
    )
    common, l1, agree = _Parts.apply(student, teacher, job)
    common, l1 = (part.sum() / denominator.clamp_min(1) for part in (common, l1))
    metrics = {
        "kl_common": common.detach(),
        "l1_uncommon": l1.detach(),
        "proj_accuracy": agree.to(dtype).sum() / number.clamp_min(1),
        "num_valid_chunks": number,
    }
    return temperature**2 * (common + l1), metrics


class _Side(NamedTuple):
    """Logits, and which of their rows belong to each chunk."""

    stats: RowStats
    chunk: Tensor  # [N] int64, -1: none
    count: Tensor  # [M] int64, over the sequence ranks
    order: Tensor  # [n] the rows of chunks, by chunk
    first: list[int]  # M + 1 places in order

    @classmethod
    def of(cls, logits, chunk, count, temperature, dtype, parallel) -> _Side:
        order = torch.argsort(chunk, stable=True)
        order = order[chunk[order] >= 0]
        first = torch.searchsorted(chunk[order], torch.arange(len(count) + 1, device=chunk.device)).tolist()
        return cls(row_stats(logits.detach(), order, temperature, dtype, parallel), chunk, count, order, first)

    def rows(self, chunks: range) -> Tensor:
        return self.order[self.first[chunks.start] : self.first[chunks.stop]]

    def means(self, logits: Tensor, chunks: range, temperature: float, parallel: Parallel) -> Tensor:
        """Chunk means of log_softmax(z / τ) over the sequence ranks, [chunks, W]."""
        sums = torch.zeros(len(chunks), logits.shape[1], dtype=self.stats.max.dtype, device=logits.device)
        for tile in tiles(self.rows(chunks), logits.shape[1]):
            log_p = self.stats.log_softmax(logits[tile].to(sums.dtype), tile, temperature)
            sums.index_add_(0, self.chunk[tile] - chunks.start, log_p)
        return parallel.sequence_sum(sums) / self.divisor(chunks)

    def divisor(self, chunks: range) -> Tensor:
        return self.count[chunks.start : chunks.stop, None].to(self.stats.max.dtype) + COUNT_EPS


class _Job(NamedTuple):
    student: _Side
    teacher: _Side
    students: Tensor  # [n] int64 mapped columns of the slab
    pairs: Tensor  # [n] int64, their places in `teachers`
    teachers: Tensor  # all mapped teacher tokens
    counted: Tensor  # [M] bool
    step: int  # chunks of a tile
    m: int
    temperature: float
    reverse: bool
    parallel: Parallel

    def tiles(self) -> Iterator[range]:
        return (range(c, min(c + self.step, len(self.counted))) for c in range(0, len(self.counted), self.step))

    def means(self, student: Tensor, teacher: Tensor, chunks: range) -> tuple[Tensor, Tensor]:
        sides = (self.student, student), (self.teacher, teacher)
        return tuple(side.means(logits, chunks, self.temperature, self.parallel) for side, logits in sides)

    def top(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x and y [chunks, m], descending; the slab's candidates for x; and where in all slabs' candidates x is."""
        rest = _others(A.shape[1], self.students)
        own = A[:, rest].topk(min(self.m, len(rest)), 1, sorted=False)
        padded = torch.full((len(A), self.m), -torch.inf, dtype=A.dtype, device=A.device)
        padded[:, : own.values.shape[1]] = own.values
        x = self.parallel.vocab_gather(padded).topk(self.m, 1)
        y = B[:, _others(B.shape[1], self.teachers)].topk(self.m, 1)
        return x.values.exp(), y.values.exp(), rest[own.indices], x.indices

    def prefer(self, a: Tensor) -> Tensor:
        """The first place in `teachers` where the chunk's mapped student tokens are likeliest, over all slabs, [chunks]."""
        if len(self.pairs):
            best, place = a.max(1)
            place = self.pairs[place]
        else:
            best, place = a.new_full((len(a),), -torch.inf), self.pairs.new_full((len(a),), len(self.teachers))
        overall = self.parallel.vocab_max(best)
        return -self.parallel.vocab_max(torch.where(best == overall, -place, -len(self.teachers)))


class _Parts(torch.autograd.Function):
    """common [M], l1 [M] and agree [M]."""

    @staticmethod
    def forward(ctx, student, teacher, job):
        common, l1 = job.student.stats.sum.new_zeros(2, len(job.counted))
        agree = torch.zeros_like(job.counted)
        for chunks in job.tiles():
            here, (A, B) = slice(chunks.start, chunks.stop), job.means(student, teacher, chunks)
            a, b, b_all = A[:, job.students], B[:, job.teachers[job.pairs]], B[:, job.teachers]
            common[here] = (times(a.exp(), a - b) if job.reverse else times(b.exp(), b - a)).sum(1)
            x, y, *_ = job.top(A, B)
            l1[here] = (x - y).abs().sum(1)
            if len(job.teachers):
                agree[here] = job.prefer(a) == b_all.argmax(1)
        ctx.save_for_backward(student, teacher)
        ctx.job = job
        ctx.mark_non_differentiable(agree)
        common = torch.where(job.counted, job.parallel.vocab_sum(common), 0.0)
        return common, torch.where(job.counted, l1, 0.0), job.counted & agree

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_common, grad_l1, _):
        (student, teacher), job = ctx.saved_tensors, ctx.job
        out = torch.zeros_like(student)
        for chunks in job.tiles():
            here, (A, B) = slice(chunks.start, chunks.stop), job.means(student, teacher, chunks)
            a, b = A[:, job.students], B[:, job.teachers[job.pairs]]
            x, y, candidates, places = job.top(A, B)
            # x's share of the gradient goes back to the slab it came from
            slope = x.new_zeros(len(x), job.m * job.parallel.vocab_shards).scatter(1, places, (x - y).sign() * x)
            slope = slope[:, job.m * job.parallel.vocab_rank :][:, : candidates.shape[1]]
            D = torch.zeros_like(A).scatter(1, candidates, slope * grad_l1[here, None])
            D[:, job.students] = (times(a.exp(), 1 + a - b) if job.reverse else -b.exp()) * grad_common[here, None]
            D = torch.where(job.counted[here, None], D, 0.0) / job.student.divisor(chunks) / job.temperature
            total = job.parallel.vocab_sum(D.sum(1, keepdim=True))
            for tile in tiles(job.student.rows(chunks), student.shape[1]):
                p, c = job.student.stats.softmax(student[tile].to(D.dtype), tile, job.temperature), job.student.chunk[tile]
                out[tile] = (D[c - chunks.start] - p * total[c - chunks.start]).to(out.dtype)
        return out, None, None


def _others(width: int, columns: Tensor) -> Tensor:
    kept = torch.ones(width, dtype=torch.bool, device=columns.device)
    kept[columns] = False
    return kept.nonzero()[:, 0]
