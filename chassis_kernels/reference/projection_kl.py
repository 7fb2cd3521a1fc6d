"""KL between a teacher and a student with another tokenizer, chunk by chunk, through a sparse projection M [V_s, V_t].

Within the teacher's columns J [k], for a chunk covered by the student rows S and the teacher rows T:

    a = Σ_s pbar[s] M[s, J],  pbar = mean over S of softmax(z_s / τ)          r = a / (Σa + ε),  l = log(r + ε)
    Q = mean over T of log_softmax(z_t[J] / τ)
    forward KL = Σ_j exp(Q)(Q - l),     reverse KL = Σ_j exp(l)(l - Q)        ε = 1e-10, means divide by (count + ε)

Backward, with g = dKL/dr (forward -exp(Q) / (r + ε), reverse 1 + l - Q), G = (g - Σ g r) / (Σa + ε) / (count + ε):

    dKL/dz[t, s] = p_t[s] / τ (Σ_{j in J} M[s, j] G[j] - Σ_s' p_t[s'] Σ_j M[s', j] G[j])

The projection of a mean is the mean of projections, so chunks are projected, not rows. Method: "x-token" distillation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from chassis_kernels.chunks import COUNT_EPS, Chunks, Layout, chunk_means, layout, only
from chassis_kernels.reference.precision import compute_dtype, without_autocast
from chassis_kernels.sparse import Edges, SparseProjection, slice_columns

EPS = 1e-10


class ProjectionKLStats(NamedTuple):
    """What the loss also knows; no gradients."""

    accuracy: Tensor  # [] share of the paired chunks where student and teacher prefer the same column
    valid_pairs: Tensor  # [] int64 chunks that enter the loss
    chunk_kl: Tensor  # [B, C] nats, 0 where there is no pair; neither weighted nor scaled by τ²
    columns: Tensor  # [k] int64, J


def loss(
    student_logits: Tensor,  # [B, T_s, >= V_s]
    teacher_logits: Tensor,  # [B, T_t, V_t]
    projection: SparseProjection,
    chunks: Chunks,
    *,
    temperature: float = 1.0,
    vocab_topk: int = 8192,
    reverse: bool = False,
    exact_only: bool = False,
    sample_mask: Tensor | None = None,
    column_mask: Tensor | None = None,
    columns: Tensor | None = None,
    denominator: Tensor | float | None = None,
    op: Callable | None = None,
    select: Callable | None = None,
) -> tuple[Tensor, ProjectionKLStats]:
    """`chassis_kernels.projection_kl` with `op` and `select` as its two kernels: the eager ones below unless named."""
    plan = layout(chunks, sample_mask, exact_only, compute_dtype(student_logits, teacher_logits))
    weight = chunk_weights(plan, temperature, denominator)
    arguments = op_arguments(
        student_logits, teacher_logits, projection, plan, temperature, vocab_topk, reverse, column_mask, columns, select
    )
    kl, agree, *_ = (op or projection_kl)(*arguments)
    total = torch.where(weight != 0, weight * kl, 0.0).sum()
    return total, stats(plan, kl, agree, chunks, arguments[5])


def chunk_weights(plan: Layout, temperature: float, denominator: Tensor | float | None) -> Tensor:
    """τ² · sample mask / D per chunk, [M]; D is at least 1."""
    denominator = plan.counted.sum() if denominator is None else torch.as_tensor(denominator, device=plan.weight.device)
    return plan.weight * temperature**2 / denominator.to(plan.weight.dtype).clamp_min(1)


def op_arguments(
    student_logits, teacher_logits, projection, plan, temperature, vocab_topk, reverse, column_mask, columns, select
) -> tuple:
    """The arguments of the op, over flattened rows."""
    student, teacher = student_logits.flatten(0, 1), teacher_logits.detach().flatten(0, 1)
    if columns is None:
        keep = None if column_mask is None else column_mask.flatten()
        columns = (select or top_columns)(teacher[:, : projection.n_teacher], keep, vocab_topk)
    ids = plan.student, plan.teacher, projection.n_student, len(plan.weight)
    return student, teacher, *projection.columns, columns, *ids, float(temperature), reverse


def stats(plan: Layout, kl: Tensor, agree: Tensor, chunks: Chunks, columns: Tensor) -> ProjectionKLStats:
    accuracy = agree.to(kl.dtype).sum() / plan.paired.sum().clamp_min(1)
    return ProjectionKLStats(accuracy, plan.counted.sum(), kl.detach().view(chunks.valid.shape), columns)


@without_autocast
def projection_kl(
    student: Tensor,  # [N_s, >= V_s]
    teacher: Tensor,  # [N_t, V_t]
    start: Tensor,  # [V_t + 1], with rows and weights the projection's column view
    rows: Tensor,
    weights: Tensor,
    columns: Tensor,  # [k] int64, J
    student_chunk: Tensor,  # [N_s] int64, -1: none
    teacher_chunk: Tensor,  # [N_t] int64
    width: int,  # V_s
    chunks: int,  # M
    temperature: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kl [M], 0 for a chunk without rows on either side; agree [M] bool: r and Q have the same largest column; and per
    student row max z and 1 / Σ exp((z - max) / τ), both 0 for a row that is compared with nothing."""
    dtype = compute_dtype(student, teacher)
    n_student, n_teacher = counts(student_chunk, chunks), counts(teacher_chunk, chunks)
    p, row_max, row_scale = softmax(student[:, :width].to(dtype), temperature)
    a = project(chunk_means(p, student_chunk, n_student), slice_columns(start, rows, weights, columns), len(columns))
    Q = chunk_means(torch.log_softmax(teacher[:, columns].to(dtype) / temperature, 1), teacher_chunk, n_teacher)
    r = a / (a.sum(1, keepdim=True) + EPS)
    l = (r + EPS).log()
    kl = (times(l.exp(), l - Q) if reverse else times(Q.exp(), Q - l)).sum(1)
    paired = (n_student > 0) & (n_teacher > 0)
    row_max, row_scale = (torch.where(only(student_chunk, paired) >= 0, t, 0.0) for t in (row_max, row_scale))
    agree = paired & (r.argmax(1) == Q.argmax(1)) if len(columns) else torch.zeros_like(paired)
    return torch.where(paired, kl, 0.0), agree, row_max, row_scale


@without_autocast
def projection_kl_backward(
    grad: Tensor,  # [M]
    student: Tensor,
    teacher: Tensor,
    start: Tensor,
    rows: Tensor,
    weights: Tensor,
    columns: Tensor,
    student_chunk: Tensor,
    teacher_chunk: Tensor,
    width: int,
    chunks: int,
    temperature: float,
    reverse: bool,
    row_max: Tensor,  # [N_s]
    row_scale: Tensor,  # [N_s]
) -> Tensor:
    """The gradient with respect to the student logits, in their dtype: the closed form above."""
    dtype = compute_dtype(student, teacher)
    n_student, n_teacher = counts(student_chunk, chunks), counts(teacher_chunk, chunks)
    edges = slice_columns(start, rows, weights, columns)
    z = student[:, :width].to(dtype)
    row_max, row_scale = row_max[:, None].to(dtype), row_scale[:, None].to(dtype)
    p = torch.where(row_scale == 0, 0.0, ((z - row_max) / temperature).exp() * row_scale)
    a = project(chunk_means(p, student_chunk, n_student), edges, len(columns))
    Q = chunk_means(torch.log_softmax(teacher[:, columns].to(dtype) / temperature, 1), teacher_chunk, n_teacher)
    total = a.sum(1, keepdim=True) + EPS
    r = a / total
    g = 1 + (r + EPS).log() - Q if reverse else -Q.exp() / (r + EPS)
    G = (g - (g * r).sum(1, keepdim=True)) / total / (n_student.to(dtype) + COUNT_EPS)[:, None]
    paired = (n_student > 0) & (n_teacher > 0) & (grad != 0)
    G = torch.where(paired[:, None], G * grad.to(dtype)[:, None], 0.0)
    back = G.new_zeros(chunks, width)
    back.index_add_(1, edges.rows, G[:, edges.positions] * edges.weights.to(dtype))
    out = torch.zeros_like(student)
    kept = (student_chunk >= 0).nonzero()[:, 0]
    back, p = back[student_chunk[kept]], p[kept]
    out[kept, :width] = (p / temperature * (back - (p * back).sum(1, keepdim=True))).to(out.dtype)
    return out


def top_columns(teacher: Tensor, keep: Tensor | None, k: int) -> Tensor:
    """The k columns of teacher [N, V_t] with the largest logit in the rows `keep` [N] bool; ascending, [min(k, V_t)].

    Among equal maxima the lowest ids win; a column whose rows are all left out counts as -inf.
    """
    k = min(k, teacher.shape[1])
    if teacher.shape[0] == 0:
        return torch.arange(k, device=teacher.device)
    if keep is not None:
        teacher = torch.where(keep[:, None], teacher, -torch.inf)
    best = torch.sort(teacher.amax(0), descending=True, stable=True).indices[:k]
    return best.sort().values


def softmax(z: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(z / τ) of [N, V > 0], with max z and 1 / Σ exp((z - max) / τ) per row."""
    row_max = z.detach().amax(1)
    e = ((z - row_max[:, None]) / temperature).exp()
    scale = 1 / e.sum(1)
    return e * scale[:, None], row_max, scale.detach()


def project(p: Tensor, edges: Edges, k: int) -> Tensor:
    """p M[:, J]: from [M, V_s] to [M, k]."""
    return p.new_zeros(len(p), k).index_add(1, edges.positions, p[:, edges.rows] * edges.weights.to(p.dtype))


def times(p: Tensor, x: Tensor) -> Tensor:
    """p x, and 0 where p is 0 even if x is infinite."""
    return torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, x))


def counts(ids: Tensor, chunks: int) -> Tensor:
    """Rows per chunk, [M] int64."""
    total = torch.zeros(chunks + 1, dtype=torch.int64, device=ids.device)
    return total.index_add(0, ids + 1, torch.ones_like(ids))[1:]
