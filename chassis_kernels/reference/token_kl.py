"""Losses between models that share a tokenizer: position by position, with the next-token mask."""

from __future__ import annotations

import torch
from torch import Tensor

from chassis_kernels.chunks import next_token
from chassis_kernels.reference.precision import compute_dtype, without_autocast
from chassis_kernels.reference.projection_kl import times, top_columns

TOKENS_EPS = 1e-8
SCORED_ROWS = 32  # rows of a float copy that only gives a score


def loss(
    student_logits: Tensor,  # [B, T, V]
    teacher_logits: Tensor,  # [B, T, >= V]
    mask: Tensor,  # [B, T], weight of each position
    *,
    temperature: float = 1.0,
    vocab_topk: int | None = None,
    reverse: bool = False,
    n_tokens: Tensor | float,
    column_mask: Tensor | None = None,  # [B, T] bool
) -> Tensor:
    """`chassis_kernels.token_kl` as PyTorch expressions: τ² Σ mask KL / (n_tokens + 1e-8)."""
    width = student_logits.shape[-1]
    student, teacher = (t.flatten(0, 1) for t in (student_logits, teacher_logits[..., :width]))
    columns = None
    if vocab_topk is not None:
        columns = top_columns(teacher, None if column_mask is None else column_mask.flatten(), vocab_topk)
    kl = token_kl(student, teacher, columns, None, temperature, reverse)
    return temperature**2 * _masked_sum(kl, mask.flatten()) / (n_tokens + TOKENS_EPS)


@without_autocast
def token_kl(
    student: Tensor,  # [N, V]
    teacher: Tensor,  # [N, >= V]
    columns: Tensor | None,  # [k] int64, no id twice
    keep: Tensor | None,  # [N] bool
    temperature: float,
    reverse: bool,
) -> Tensor:
    """KL(teacher ‖ student) per row within the columns (None: all V), [N]; reverse: KL(student ‖ teacher). 0 if not kept."""
    log_p, log_q = _log_softmaxes(student, teacher, columns, temperature)
    kl = (times(log_p.exp(), log_p - log_q) if reverse else times(log_q.exp(), log_q - log_p)).sum(1)
    return kl if keep is None else torch.where(keep, kl, 0.0)


@without_autocast
def token_kl_backward(
    grad: Tensor,  # [N]
    student: Tensor,
    teacher: Tensor,
    columns: Tensor | None,
    keep: Tensor | None,
    temperature: float,
    reverse: bool,
) -> Tensor:
    """The gradient for the student logits: (p - q) / τ, or reverse p (log p - log q - KL) / τ; 0 outside the columns."""
    log_p, log_q = _log_softmaxes(student, teacher, columns, temperature)
    p = log_p.exp()
    if reverse:
        kl = times(p, log_p - log_q).sum(1, keepdim=True)
        part = times(p, log_p - log_q - kl)
    else:
        part = p - log_q.exp()
    kept = grad != 0 if keep is None else keep & (grad != 0)
    part = torch.where(kept[:, None], part * (grad.to(p.dtype) / temperature)[:, None], 0.0)
    out = torch.zeros_like(student)
    out[:, slice(None) if columns is None else columns] = part.to(out.dtype)
    return out


def _log_softmaxes(student: Tensor, teacher: Tensor, columns: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    dtype, teacher = compute_dtype(student, teacher), teacher[:, : student.shape[1]]
    if columns is not None:
        student, teacher = student[:, columns], teacher[:, columns]
    return torch.log_softmax(student.to(dtype) / temperature, 1), torch.log_softmax(teacher.to(dtype) / temperature, 1)


def averaged_logits(teachers: list[Tensor], weights: list[float]) -> Tensor:
    """Σ (w_i / Σw) z_i in float32 or better."""
    dtype, total = compute_dtype(*teachers), sum(weights)
    return sum((weight / total) * logits.to(dtype) for weight, logits in zip(weights, teachers, strict=True))


def per_token(values: Tensor, mask: Tensor, n_tokens: Tensor | float) -> Tensor:
    """Σ mask values / (n_tokens + 1e-8)."""
    return _masked_sum(values.to(mask.dtype), mask) / (n_tokens + TOKENS_EPS)


def confidence(metric: str, logits: Tensor, real: Tensor, size: int) -> Tensor:
    """How sure a teacher is at its positions `real` [B, T] bool, over its first `size` tokens: entropy: -H in nats;
    max_prob: the largest probability. 0 elsewhere, [B, T]."""
    rows, real = logits.flatten(0, 1), real.flatten()
    out = torch.zeros(len(rows), dtype=compute_dtype(logits), device=logits.device)
    for tile in real.nonzero()[:, 0].split(SCORED_ROWS):
        p = torch.softmax(rows[tile, :size].to(out.dtype), -1)
        out[tile] = (p * (p + 1e-10).log()).sum(-1) if metric == "entropy" else p.amax(-1)
    return out.view(logits.shape[:2])


def next_token_mask(token_mask: Tensor, sample_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """token_mask[t + 1] · sample_mask, [B, T]."""
    mask = next_token(token_mask).to(dtype)
    return mask if sample_mask is None else mask * sample_mask.to(dtype)[:, None]


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask != 0, values * mask, 0.0).sum()
