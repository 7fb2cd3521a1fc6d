"""The gold loss (relaxed: H-KL): KL on the tokens two vocabularies share, sorted L1 on the rest.

With A and B the chunk means of the log-probabilities of student and teacher (both full heads), per chunk:

    common = Σ_{mapped pairs} exp(B)(B - A)                   (reverse swaps the roles; not renormalised)
    l1     = Σ_i |x_i - y_i|,  x, y the m largest of exp(A[unmapped student]) and exp(B[unmapped teacher]), descending

Method: universal-logit distillation with an exact common part, as in "x-token" distillation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chassis_kernels.chunks import Chunks, chunk_means, layout
from chassis_kernels.reference.precision import compute_dtype
from chassis_kernels.reference.projection_kl import times
from chassis_kernels.sparse import SparseProjection


def gold_kl(
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
) -> tuple[Tensor, dict[str, Tensor]]:
    """τ² (Σ common + Σ l1) / D over the chunks that count, and {kl_common, l1_uncommon, proj_accuracy, num_valid_chunks}.

    D is `denominator`, or the number of chunks that count, at least 1.
    """
    dtype = compute_dtype(student_logits, teacher_logits)
    plan = layout(chunks, sample_mask, exact_only, dtype)
    counted = plan.counted
    denominator = counted.sum() if denominator is None else denominator
    denominator = torch.as_tensor(denominator, dtype=dtype, device=student_logits.device).clamp_min(1)
    teacher_logits = teacher_logits[..., : projection.n_teacher]
    A = _means(student_logits, plan.student, plan.student_count, counted, dtype, temperature)
    B = _means(teacher_logits, plan.teacher, plan.teacher_count, counted, dtype, temperature)
    students, teachers = projection.exact_map(relaxed=relaxed)
    a, b = A[:, students], B[:, teachers]
    common = (times(a.exp(), a - b) if reverse else times(b.exp(), b - a)).sum() / denominator
    rest_a, rest_b = _without(A, students), _without(B, teachers)
    m = min(rest_a.shape[1], rest_b.shape[1], uncommon_topk)
    l1 = (rest_a.topk(m, 1).values.exp() - rest_b.topk(m, 1).values.exp()).abs().sum() / denominator
    agree = (a.argmax(1) == b.argmax(1)).to(dtype).sum() if a.numel() else a.new_zeros(())
    number = counted.sum()
    metrics = {
        "kl_common": common.detach(),
        "l1_uncommon": l1.detach(),
        "proj_accuracy": agree / number.clamp_min(1),
        "num_valid_chunks": number,
    }
    return temperature**2 * (common + l1), metrics


def _means(logits: Tensor, ids: Tensor, counts: Tensor, counted: Tensor, dtype: torch.dtype, temperature: float) -> Tensor:
    log_p = torch.log_softmax(logits.flatten(0, 1).to(dtype) / temperature, 1)
    return chunk_means(log_p, ids, counts)[counted]


def _without(values: Tensor, columns: Tensor) -> Tensor:
    kept = torch.ones(values.shape[1], dtype=torch.bool, device=values.device)
    kept[columns] = False
    return values[:, kept]
