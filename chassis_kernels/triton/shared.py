"""What the Triton kernels share: launching one with its tuning entry, and small device functions.

A kernel's index arithmetic starts from `tl.program_id(axis).to(tl.int64)`; row lengths and strides may pass 2^31 elements.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from chassis_kernels import backends
from chassis_kernels.triton import tuning

LOG2E = 1.4426950408889634  # exp(x) = exp2(x LOG2E): hosts pass LOG2E / τ, which costs the kernel nothing
LN2 = tl.constexpr(0.6931471805599453)
MINUS_INFINITY = tl.constexpr(float("-inf"))
INTERPRETED = tl.constexpr(backends.interpreting())
PRECISION = tl.constexpr("ieee" if backends.interpreting() else "bf16x6")


def launch(op: str, kernel, grid: Callable[[dict], tuple[int, ...]], size: int, /, **arguments) -> None:
    """Run `kernel(**arguments)` with the tuning entry of `op` for a problem of `size`, on its tensors' device.

    `grid` makes the numbers of programs from the entry; where one is 0 there is nothing to do.
    """
    device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
    meta = tuning.entry(op, kernel.__name__, size, *_describe(device))
    programs = grid(meta)
    if 0 in programs:
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        run(op, kernel, programs, arguments, meta)


def run(op: str, kernel, programs: tuple[int, ...], arguments: dict, meta: dict) -> None:
    """Every launch ends here. Products and sums may fuse: that rounds once less."""
    kernel[programs](**arguments, **meta, enable_fp_fusion=True)


@functools.cache
def _describe(device: torch.device) -> tuple[str, str]:
    """Name and architecture of a device, as the tuning tables call them."""
    if backends.interpreting():
        return "interpreter", "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.name, properties.gcnArchName.split(":")[0]
    return properties.name, f"sm_{properties.major}{properties.minor}"


@triton.jit
def finite_max(x, axis: tl.constexpr):
    """The largest value along an axis, but at least the lowest float: z - finite_max(z) is -inf, not NaN, for -inf z."""
    return tl.maximum(tl.max(x, axis), -3.4028234663852886e38)


@triton.jit
def online(best, total, x, scale):
    """(max, Σ exp2((x - max) scale)) of what was seen, from (-inf, 0) on, with the values x added; -inf adds nothing."""
    new = tl.maximum(best, finite_max(x, 0))
    return new, total * tl.exp2((best - new) * scale) + tl.sum(tl.exp2((x - new) * scale), 0)


@triton.jit
def dot(left, right, total):
    """total + left right, summed in float32; two factors of one half type as they are, others as float32.

    A float32 is three bfloat16, of whose nine products the six above its last digit are summed.
    """
    if left.dtype != right.dtype or INTERPRETED:  # the interpreter would multiply the bits of a bfloat16
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def tanh(x):
    """A polynomial near 0, where 1 - exp(-2 |x|) would cancel; the interpreter has no tanh of its own."""
    square = x * x
    near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))
