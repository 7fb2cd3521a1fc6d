"""Losses between models that share a tokenizer: position by position, with the next-token mask. And the CE beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from chassis_kernels.chunks import next_token
from chassis_kernels.reference.precision import compute_dtype, without_autocast
from chassis_kernels.reference.projection_kl import times, top_columns

TOKENS_EPS = 1e-8


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
