"""Losses between models that share a tokenizer: position by position, with the next-token mask. And the CE beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from chassis_kernels.chunks import next_token
from chassis_kernels.reference.precision import compute_dtype
from chassis_kernels.reference.projection_kl import times, top_columns

TOKENS_EPS = 1e-8


def topk_kl(
    student_logits: Tensor,  # [B, T, V]
    teacher_logits: Tensor,  # [B, T, >= V]
    mask: Tensor,  # [B, T], weight of each position
    *,
    temperature: float,
    vocab_topk: int,
    reverse: bool,
    n_tokens: Tensor,
    column_mask: Tensor | None = None,  # [B, T] bool
) -> Tensor:
    """τ² Σ mask KL / (n_tokens + 1e-8) within the columns J of the largest teacher logits, both sides normalised in J."""
    width = student_logits.shape[-1]
    teacher_logits = teacher_logits[..., :width]
    keep = None if column_mask is None else column_mask.flatten()
    columns = top_columns(teacher_logits.flatten(0, 1), keep, vocab_topk)
    return full_kl(
        student_logits[..., columns],
        teacher_logits[..., columns],
        mask,
        temperature=temperature,
        reverse=reverse,
        n_tokens=n_tokens,
    )


def full_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    *,
    temperature: float,
    reverse: bool,
    n_tokens: Tensor,
) -> Tensor:
    """τ² Σ mask KL(teacher ‖ student) / (n_tokens + 1e-8) over the whole vocabulary; reverse: KL(student ‖ teacher)."""
    dtype = compute_dtype(student_logits, teacher_logits)
    student = torch.log_softmax(student_logits.to(dtype) / temperature, -1)
    teacher = torch.log_softmax(teacher_logits.to(dtype) / temperature, -1)
    kl = (times(student.exp(), student - teacher) if reverse else times(teacher.exp(), teacher - student)).sum(-1)
    return temperature**2 * _masked_sum(kl, mask) / (n_tokens + TOKENS_EPS)


def averaged_logits(teachers: list[Tensor], weights: list[float]) -> Tensor:
    """Σ (w_i / Σw) z_i in float32 or better."""
    dtype, total = compute_dtype(*teachers), sum(weights)
    return sum((weight / total) * logits.to(dtype) for weight, logits in zip(weights, teachers, strict=True))


def next_token_nll(logits: Tensor, input_ids: Tensor) -> Tensor:
    """-log p of the token after each position, in nats, [B, T]; 0 at the last position."""
    log_p = torch.log_softmax(logits[:, :-1].to(compute_dtype(logits)), -1)
    nll = -log_p.gather(2, input_ids[:, 1:, None])[..., 0]
    return torch.cat([nll, torch.zeros_like(nll[:, :1]) if nll.shape[1] else nll.new_zeros(logits.shape[:2])], 1)


def cross_entropy(
    logits: Tensor,  # [B, T, V]
    input_ids: Tensor,  # [B, T]
    mask: Tensor,  # [B, T] next-token weights
    n_tokens: Tensor,
) -> tuple[Tensor, Tensor]:
    """The next-token loss per token in nats, at temperature 1, and the share of tokens guessed right."""
    loss = _masked_sum(next_token_nll(logits, input_ids), mask) / (n_tokens + TOKENS_EPS)
    guess = logits.detach().argmax(-1)[:, :-1]
    right = _masked_sum((guess == input_ids[:, 1:]).to(loss.dtype), mask[:, :-1])
    return loss, right / (n_tokens + TOKENS_EPS)


def teacher_score(metric: str, logits: Tensor, input_ids: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The summed score of a teacher on its own tokens, and how many entered: to be reduced over the group, then divided.

    ce: -NLL of the next token; entropy: -H; max_prob: the largest probability. `real` [B, T] bool: the tokens that count;
    ce asks it of the predicted token, the others of the token itself.
    """
    if metric == "ce":
        real, score = next_token(real), -next_token_nll(logits, input_ids)
    else:
        p = torch.softmax(logits.to(compute_dtype(logits)), -1)
        score = (p * (p + 1e-10).log()).sum(-1) if metric == "entropy" else p.amax(-1)
    real = real.to(score.dtype)
    return _masked_sum(score, real).detach(), real.sum()


def next_token_mask(token_mask: Tensor, sample_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """token_mask[t + 1] · sample_mask, [B, T]."""
    mask = next_token(token_mask).to(dtype)
    return mask if sample_mask is None else mask * sample_mask.to(dtype)[:, None]


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask != 0, values * mask, 0.0).sum()
