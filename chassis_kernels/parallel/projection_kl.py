"""projection_kl on sharded logits.

(max, Σ exp) of each row        over the slab, then over the vocabulary ranks
a_c = Σ_s pbar[s] M[s, J]       over the slab's rows of M and the rank's rows of the chunk, then over both groups
Q_c, J                          over the rank's teacher rows, then over the sequence ranks
KL_c, G_c = dKL / da_c / n_c    the same on every rank
dz[t, s] = p_t[s] / τ (B[s] - Σ p_t B),  B = M[:, J] G_c        the sum over the slab, then over the vocabulary ranks
"""

from __future__ import annotations

import torch
from torch import Tensor

from chassis_kernels.chunks import COUNT_EPS, Chunks, layout
from chassis_kernels.parallel.groups import Parallel
from chassis_kernels.parallel.next_token import next_token_nll
from chassis_kernels.parallel.rows import Rows, RowStats, row_stats, tiles, top_columns
from chassis_kernels.reference import projection_kl as reference
from chassis_kernels.reference.precision import compute_dtype, without_autocast
from chassis_kernels.sparse import Edges, ProjectionView, SparseProjection, slice_columns


@without_autocast
def loss(
    student_logits: Tensor,  # [B, T_s, W], the rank's columns
    teacher_logits: Tensor,  # [B, T_t, >= V_t]
    projection: SparseProjection | ProjectionView,  # [V_s, V_t], whole: only the slab's rows are used
    chunks: Chunks,
    parallel: Parallel,
    *,
    temperature: float,
    vocab_topk: int,
    divergence: str,
    tail: bool,
    exact_only: bool,
    sample_mask: Tensor | None,
    column_mask: Tensor | None,
    columns: Tensor | None,
    denominator: Tensor | float | None,
    labels: Tensor | None,
    label_weight: Tensor | None,
) -> tuple[Tensor, reference.ProjectionKLStats]:
    """`chassis_kernels.projection_kl` with `parallel`; nll and correct are those of the rank's positions."""
    logits, spread = parallel.cut(student_logits, projection.n_student)
    dtype = compute_dtype(student_logits, teacher_logits)
    plan = layout(chunks, sample_mask, exact_only, dtype, parallel)
    teacher = teacher_logits.detach()[..., : projection.n_teacher].flatten(0, 1)
    if columns is None:
        columns = top_columns(teacher, None if column_mask is None else column_mask.flatten(), vocab_topk, dtype, parallel)
    edges, k = slab_edges(slice_columns(*projection.columns, columns), spread.slab(logits)), len(columns)
    Q = _teacher_means(teacher, columns, plan, temperature, tail, dtype, parallel)
    options = k, float(temperature), reference.DIVERGENCES.index(divergence), tail, spread
    rows = plan.student, plan.student_count, plan.paired
    kl, agree = _ProjectionKL.apply(logits.flatten(0, 1), *edges, *rows, Q, *options)
    total = reference.weighted_sum(kl, reference.chunk_weights(plan, temperature, denominator))
    stats = reference.stats(plan, kl, agree, chunks, columns)
    if labels is not None:
        nll, correct = next_token_nll(logits, labels, spread)
        stats = stats._replace(nll=nll, correct=correct)
        if label_weight is not None:
            total = total + parallel.sequence_sum(reference.weighted_sum(nll, label_weight.to(nll.dtype)))
    return total, stats


def slab_edges(edges: Edges, slab: range) -> Edges:
    """The entries of the slab's rows, counted from its first; `edges` is sorted by row."""
    first, last = torch.searchsorted(edges.rows, edges.rows.new_tensor([slab.start, slab.stop])).tolist()
    rows, positions, weights = (part[first:last] for part in edges)
    return Edges(rows - slab.start, positions, weights)


class _ProjectionKL(torch.autograd.Function):
    """kl [M] and agree [M] bool. Saved besides the inputs: each row's (max, Σ exp), and G [M, k] for an upstream of 1."""

    @staticmethod
    def forward(ctx, logits, rows, positions, weights, chunk, count, paired, Q, k, temperature, divergence, tail, parallel):
        edges, kept = Edges(rows, positions, weights.to(Q.dtype)), (chunk >= 0).nonzero()[:, 0]
        stats = row_stats(logits, kept, temperature, Q.dtype, parallel)
        a = torch.zeros(len(count), k, dtype=Q.dtype, device=logits.device)
        for tile in tiles(kept, max(logits.shape[1], k, len(rows))):
            p = stats.softmax(logits[tile].to(Q.dtype), tile, temperature)
            a.index_add_(0, chunk[tile], reference.project(p, edges, k))
        divisor = count.to(Q.dtype)[:, None] + COUNT_EPS
        a /= divisor
        G = parallel.sequence_sum(parallel.vocab_sum(a))  # until it becomes G, a
        kl, agree = torch.zeros_like(Q[:, :1].sum(1)), torch.zeros_like(paired)
        for tile in tiles(paired.nonzero()[:, 0], k):
            (r, total), q = reference.shares(G[tile], tail), Q[tile]
            terms, g = reference.compare(r, q, divergence)
            kl[tile] = terms.sum(1)
            agree[tile] = r[:, :k].argmax(1) == q[:, :k].argmax(1) if k else False
            G[tile] = reference.pull_back(g, r, total, tail) / divisor[tile]
        ctx.save_for_backward(logits, *edges, chunk, G, *stats)
        ctx.temperature, ctx.parallel = temperature, parallel
        ctx.mark_non_differentiable(agree)
        return kl, agree

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        logits, rows, positions, weights, chunk, G, *stats = ctx.saved_tensors
        stats, temperature, kept = RowStats(*stats), ctx.temperature, (chunk >= 0).nonzero()[:, 0]
        dot = torch.zeros_like(stats.sum)

        def parts(tile: Rows) -> tuple[Tensor, Tensor]:
            p, upstream = stats.softmax(logits[tile].to(G.dtype), tile, temperature), grad[chunk[tile], None]
            slope = torch.where(upstream != 0, G[chunk[tile]] * upstream, 0.0)
            return p, torch.zeros_like(p).index_add(1, rows, slope[:, positions] * weights)

        width = max(logits.shape[1], len(rows))
        for tile in tiles(kept, width):
            p, back = parts(tile)
            dot[tile] = (p * back).sum(1)
        dot = ctx.parallel.vocab_sum(dot)
        out = torch.zeros_like(logits)
        for tile in tiles(kept, width):
            p, back = parts(tile)
            out[tile] = (p * (back - dot[tile, None]) / temperature).to(out.dtype)
        return out, *(None,) * 12


def _teacher_means(teacher, columns, plan, temperature, tail, dtype, parallel) -> Tensor:
    """Q [M, outcomes]."""
    Q = torch.zeros(len(plan.weight), len(columns) + tail, dtype=dtype, device=teacher.device)
    for tile in tiles((plan.teacher >= 0).nonzero()[:, 0], teacher.shape[1]):
        log_q = reference.log_teacher(teacher[tile], teacher.shape[1], columns, temperature, tail, dtype)
        Q.index_add_(0, plan.teacher[tile], log_q)
    return parallel.sequence_sum(Q) / (plan.teacher_count.to(dtype) + COUNT_EPS)[:, None]
