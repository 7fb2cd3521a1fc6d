"""The gold loss (relaxed: H-KL): KL on the tokens two vocabularies share, sorted L1 on the rest.

With A and B the chunk means of the log-probabilities of student and teacher (both full heads), per chunk:

    common = Σ_{mapped pairs} exp(B)(B - A)                   (reverse swaps the roles; not renormalised)
    l1     = Σ_i |x_i - y_i|,  x, y the m largest of exp(A[unmapped student]) and exp(B[unmapped teacher]), descending

Backward, with D = dloss/dA (common: -exp(B), reverse exp(A)(1 + A - B); l1: sign(x_i - y_i) x_i at the token of rank i):

    dloss/dz[t, s] = (D[s] - p_t[s] Σ D) / (count + ε) / τ

Method: universal-logit distillation with an exact common part, as in "x-token" distillation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from chassis_kernels.chunks import COUNT_EPS, Chunks, Layout, chunk_means, counts, layout, only
from chassis_kernels.reference.precision import compute_dtype, without_autocast
from chassis_kernels.reference.projection_kl import times
from chassis_kernels.sparse import SparseProjection


def loss(
    student_logits: Tensor,  # [B, T_s, V_s]
    teacher_logits: Tensor,  # [B, T_t, >= V_t]
    projection: SparseProjection,
    chunks: Chunks,
    *,
    temperature: float = 1.0,
    uncommon_topk: int = 8192,
    reverse: bool = False,
    relaxed: bool = False,
    exact_only: bool = False,
    sample_mask: Tensor | None = None,  # [B]
    denominator: Tensor | float | None = None,
    op: Callable | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`chassis_kernels.gold_kl` with `op` as its kernel: the eager one below unless named."""
    plan = layout(chunks, sample_mask, exact_only, compute_dtype(student_logits, teacher_logits))
    options = float(temperature), uncommon_topk, reverse
    arguments = op_arguments(student_logits, teacher_logits, projection, plan, relaxed, options)
    return combine(*(op or gold_kl)(*arguments)[:3], plan, temperature, denominator)


def op_arguments(student_logits, teacher_logits, projection, plan, relaxed, options) -> tuple:
    """The arguments of the op, over flattened rows."""
    teacher = teacher_logits.detach()[..., : projection.n_teacher].flatten(0, 1)
    ids = (only(rows, plan.counted) for rows in (plan.student, plan.teacher))
    pairs = projection.exact_map(relaxed=relaxed)
    return student_logits.flatten(0, 1), teacher, *pairs, *ids, len(plan.weight), *options


def combine(
    common: Tensor,  # [M]
    l1: Tensor,  # [M]
    agree: Tensor,  # [M]
    plan: Layout,
    temperature: float,
    denominator: Tensor | float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its metrics from the chunks' parts."""
    number, divisor = plan.counted.sum(), divide_by(plan, denominator)
    common, l1 = common.sum() / divisor, l1.sum() / divisor
    metrics = {
        "kl_common": common.detach(),
        "l1_uncommon": l1.detach(),
        "proj_accuracy": agree.to(common.dtype).sum() / number.clamp_min(1),
        "num_valid_chunks": number,
    }
    return temperature**2 * (common + l1), metrics


def divide_by(plan: Layout, denominator: Tensor | float | None) -> Tensor:
    """D, [], at least 1."""
    weight = plan.weight
    given = plan.counted.sum() if denominator is None else denominator
    return torch.as_tensor(given, dtype=weight.dtype, device=weight.device).clamp_min(1)


@without_autocast
def gold_kl(
    student: Tensor,  # [N_s, V_s]
    teacher: Tensor,  # [N_t, V_t]
    students: Tensor,  # [n] int64, paired with
    teachers: Tensor,  # [n] int64; no id twice in either
    student_chunk: Tensor,  # [N_s] int64, -1: none
    teacher_chunk: Tensor,  # [N_t] int64
    chunks: int,  # M
    temperature: float,
    uncommon_topk: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """common [M] and l1 [M], 0 for a chunk without rows on either side, and agree [M] bool: both sides' likeliest of the
    mapped tokens are a pair."""
    means = _means(student, teacher, student_chunk, teacher_chunk, chunks, temperature)
    return compare(*means, students, teachers, uncommon_topk, reverse)


def compare(
    A: Tensor,  # [M, V_s] mean log-probabilities
    B: Tensor,  # [M, V_t]
    paired: Tensor,  # [M] bool
    students: Tensor,
    teachers: Tensor,
    uncommon_topk: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """common, l1 and agree from the chunk means."""
    a, b = A[:, students], B[:, teachers]
    common = (times(a.exp(), a - b) if reverse else times(b.exp(), b - a)).sum(1)
    x, y = _uncommon(A, students), _uncommon(B, teachers)
    m = min(x.shape[1], y.shape[1], uncommon_topk)
    l1 = (x.topk(m, 1).values.exp() - y.topk(m, 1).values.exp()).abs().sum(1)
    agree = paired & (a.argmax(1) == b.argmax(1)) if len(students) else torch.zeros_like(paired)
    return torch.where(paired, common, 0.0), torch.where(paired, l1, 0.0), agree


@without_autocast
def gold_kl_backward(
    grad_common: Tensor,  # [M]
    grad_l1: Tensor,  # [M]
    student: Tensor,
    teacher: Tensor,
    students: Tensor,
    teachers: Tensor,
    student_chunk: Tensor,
    teacher_chunk: Tensor,
    chunks: int,
    temperature: float,
    uncommon_topk: int,
    reverse: bool,
) -> Tensor:
    """The gradient with respect to the student logits, in their dtype: the closed form above."""
    means = _means(student, teacher, student_chunk, teacher_chunk, chunks, temperature)
    rest = students, teachers, uncommon_topk, reverse, counts(student_chunk, chunks)
    D = slopes(grad_common, grad_l1, *means, *rest)
    out = torch.zeros_like(student)
    kept = (student_chunk >= 0).nonzero()[:, 0]
    p, D = torch.softmax(student[kept].to(D.dtype) / temperature, 1), D[student_chunk[kept]]
    out[kept] = ((D - p * D.sum(1, keepdim=True)) / temperature).to(out.dtype)
    return out


def slopes(grad_common, grad_l1, A, B, paired, students, teachers, uncommon_topk, reverse, count) -> Tensor:
    """D / (count + ε) [M, V_s] for upstream gradients [M], with `count` [M] student rows; 0 where not paired."""
    a, b = A[:, students], B[:, teachers]
    D = torch.zeros_like(A)
    slope = times(a.exp(), 1 + a - b) if reverse else -b.exp()
    D[:, students] = slope * grad_common.to(A.dtype)[:, None]
    rest = _others(A.shape[1], students)
    x, y = A[:, rest], _uncommon(B, teachers)
    m = min(x.shape[1], y.shape[1], uncommon_topk)
    top = x.topk(m, 1)
    x, y = top.values.exp(), y.topk(m, 1).values.exp()
    D.scatter_(1, rest[top.indices], (x - y).sign() * x * grad_l1.to(A.dtype)[:, None])
    return torch.where(paired[:, None], D, 0.0) / (count.to(A.dtype) + COUNT_EPS)[:, None]


def _means(student, teacher, student_chunk, teacher_chunk, chunks, temperature) -> tuple[Tensor, Tensor, Tensor]:
    """Chunk means of the log-probabilities, [M, V_s] and [M, V_t], and which chunks have rows on both sides."""
    dtype, means, paired = compute_dtype(student, teacher), [], True
    for logits, ids in ((student, student_chunk), (teacher, teacher_chunk)):
        n = counts(ids, chunks)
        means.append(chunk_means(torch.log_softmax(logits.to(dtype) / temperature, 1), ids, n))
        paired = paired & (n > 0)
    return *means, paired


def _others(width: int, columns: Tensor) -> Tensor:
    kept = torch.ones(width, dtype=torch.bool, device=columns.device)
    kept[columns] = False
    return kept.nonzero()[:, 0]


def _uncommon(values: Tensor, columns: Tensor) -> Tensor:
    return values[:, _others(values.shape[1], columns)]
