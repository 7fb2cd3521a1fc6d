"""The loss of one teacher from the student's hidden states: its [T, V_s] logits exist a block of rows at a time.

loss = s · KD + c · CE      P-KL, with both factors known before the forward pass
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from chassis.models import Head
from chassis_kernels import XTokenConfig, linear_projection_kl
from chassis_kernels.chunks import next_token
from chassis_kernels.xtoken_loss import TeacherBatch


def operands(head: Head, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None, float | None]:
    """(hidden, weight, bias, softcap) that make the head's logits without its scale: cap(hidden weightᵀ + bias)."""
    bias = getattr(head.unembedding, "bias", None)
    if head.scale != 1:
        hidden, bias = hidden * head.scale, None if bias is None else bias * head.scale
    return hidden, head.unembedding.weight, bias, head.softcap


@contextlib.contextmanager
def without_logits(unembedding: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, a forward pass of the model that owns `unembedding` makes no logits: the list gets what that would read."""
    found: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        found.append(hidden)
        return hidden

    unembedding.forward = keep  # of this instance: wrappers around the model still see their own forward pass
    try:
        yield found
    finally:
        del unembedding.forward


def fused_loss(
    head: Head, hidden: Tensor, teacher: TeacherBatch, config: XTokenConfig, inputs: Mapping[str, Tensor], n_tokens: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """What `xtoken_loss` gives of the logits of hidden [B, T, D]: the loss [] in nats and its detached metrics.

    `inputs`: the batch's input_ids, attention_mask and sample_mask; n_tokens: next-token positions of the whole step.
    """
    hidden, weight, bias, softcap = operands(head, hidden)
    samples, tokens = inputs["sample_mask"], n_tokens.clamp_min(1).float()
    mask = next_token(inputs["attention_mask"]) * samples[:, None]
    teacher_weight = config.teachers[0].weight
    loss, stats = linear_projection_kl(
        hidden,
        weight,
        teacher.logits,
        teacher.projection,
        teacher.chunks,
        student_bias=bias,
        student_softcap=softcap,
        temperature=config.temperature,
        vocab_topk=config.vocab_topk,
        divergence="reverse" if config.reverse_kl else "forward",
        exact_only=config.exact_token_match_only,
        sample_mask=config.kl_loss_weight * teacher_weight * samples,
        column_mask=(teacher.token_mask != 0) & (samples != 0)[:, None],
        denominator=teacher.global_valid_chunks,
        labels=torch.where(mask != 0, next_token(inputs["input_ids"]), -1),
        label_weight=config.ce_loss_scale * mask / tokens,
    )
    factor = config.temperature**2 / teacher.global_valid_chunks.clamp_min(1).float()
    kl = factor * (samples[:, None] * stats.chunk_kl).sum()
    metrics = {
        "loss": loss,
        "kl_loss": teacher_weight * kl,
        "ce_loss": (mask * stats.nll).sum() / tokens,
        "kl_loss_scale": loss.new_tensor(config.kl_loss_weight),
        "accuracy": (mask * stats.correct).sum() / tokens,
        "kl_loss_t0": kl,
        "weight_t0": loss.new_tensor(teacher_weight),
        "proj_accuracy_t0": stats.accuracy,
        "num_valid_pairs_t0": stats.valid_pairs,
    }
    return loss, {name: value.detach() for name, value in metrics.items()}
