"""A buffer of the caller's for a gradient that is made in the same pass as the loss."""

from __future__ import annotations

import torch
from torch import Tensor


def check_buffer(buffer: Tensor, logits: Tensor) -> None:
    """ValueError unless `buffer` can take the gradient for `logits`."""
    if buffer.shape != logits.shape or buffer.dtype != logits.dtype or buffer.device != logits.device:
        raise ValueError(
            f"grad_buffer is {buffer.dtype} {tuple(buffer.shape)}, expected the logits' {logits.dtype} {tuple(logits.shape)}"
        )
    if not buffer.is_contiguous():
        raise ValueError("grad_buffer must be contiguous")


def hand_over(loss: Tensor, logits: Tensor, buffer: Tensor, op: str) -> Tensor:
    """`loss` [], as a function of `logits` whose gradient already stands in `buffer`: backward returns the buffer, once."""
    return _HandOver.apply(logits, buffer, loss, op)


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, buffer, loss, op):
        ctx.buffer, ctx.op = buffer.detach(), op
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        buffer, ctx.buffer = ctx.buffer, None
        if buffer is None:
            raise RuntimeError(f"{ctx.op} with grad_buffer allows one backward: the buffer was handed over already")
        if grad.device.type != "cpu" or grad != 1:
            buffer.mul_(grad.to(buffer.dtype) if buffer.dtype == torch.float64 else grad)
        return buffer, None, None, None
