"""A gradient made in the same pass as the loss: in a buffer of the caller's, or in memory of its own.

Where the loss is a sum of parts with known weights, its gradient is known up to one factor as soon as the loss is. Backward
then has nothing left to do: the logits are read, and their exponentials taken, once in all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from chassis_kernels import pages


def check_buffer(buffer: Tensor, logits: Tensor) -> None:
    """ValueError unless `buffer` can take the gradient for `logits`."""
    if buffer.shape != logits.shape or buffer.dtype != logits.dtype or buffer.device != logits.device:
        raise ValueError(
            f"grad_buffer is {buffer.dtype} {tuple(buffer.shape)}, expected the logits' {logits.dtype} {tuple(logits.shape)}"
        )
    if not buffer.is_contiguous():
        raise ValueError("grad_buffer must be contiguous")


def one_pass(logits: Tensor, buffer: Tensor | None, *weights: Tensor | None) -> Tensor | None:
    """Where the gradient goes if it is made together with the loss: the buffer, else new memory; None if it is not.

    float16 takes its scale before it is rounded, and a weight with a gradient of its own needs what a graph keeps.
    """
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return None
    if buffer is not None:
        check_buffer(buffer, logits)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(buffer)  # a graph that still needs its values must raise
        return buffer.detach()
    free = any(isinstance(w, Tensor) and w.requires_grad for w in weights) or torch.compiler.is_compiling()
    if free or logits.dtype not in (torch.float32, torch.bfloat16):
        return None
    return pages.empty_like(logits)


def at_once(run: Callable, logits: Tensor, buffer: Tensor | None, name: str) -> tuple:
    """`run(logits)`: a loss [] and what comes with it. With a buffer, autograd's gradient of the loss is made at once and
    copied there; backward hands the buffer over, once."""
    gradient = None if buffer is None else one_pass(logits, buffer)
    if gradient is None:
        return run(logits)
    leaf = logits.detach().requires_grad_()
    loss, rest = run(leaf)
    gradient.copy_(*torch.autograd.grad(loss, leaf))
    return hand_over(loss.detach(), logits, gradient, name, None), rest


def hand_over(loss: Tensor, logits: Tensor, gradient: Tensor, name: str, again: Callable | None, *inputs) -> Tensor:
    """`loss` [], as a function of `logits` whose gradient is already there: backward returns it, times its factor.

    again(out [N, V], *inputs) makes the gradient for a second backward; None: the second one raises.
    """
    return _HandOver.apply(logits, gradient, loss, name, again, *inputs)


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, gradient, loss, name, again, *inputs):
        ctx.gradient, ctx.name, ctx.again = gradient, name, again
        ctx.inputs = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(logits, *(value for value in inputs if isinstance(value, Tensor)))
        ctx.places = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            gradient = _made_again(ctx)
        if grad.device.type != "cpu" or grad != 1:
            gradient.mul_(grad.detach().to(gradient.dtype) if gradient.dtype == torch.float64 else grad.detach())
        if torch.is_grad_enabled():
            gradient = _Last.apply(ctx.saved_tensors[0], gradient, ctx.name)
        return gradient, *(None,) * (4 + len(ctx.inputs))


def _made_again(ctx) -> Tensor:
    if ctx.again is None:
        raise RuntimeError(f"{ctx.name} with grad_buffer allows one backward: the buffer was handed over already")
    logits, *tensors = ctx.saved_tensors
    inputs = ctx.inputs.copy()
    for i, tensor in zip(ctx.places, tensors, strict=True):
        inputs[i] = tensor
    gradient = pages.empty_like(logits)
    with torch.no_grad():
        ctx.again(gradient.flatten(0, 1), *inputs)
    return gradient


class _Last(torch.autograd.Function):
    """`gradient`, as a function of `logits` that has no derivative."""

    @staticmethod
    def forward(ctx, logits, gradient, name):
        ctx.name = name
        return gradient.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(f"{ctx.name} has no second derivative: use xtoken_loss(..., eager=True)")
