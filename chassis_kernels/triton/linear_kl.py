"""KL(softmax(b) || softmax(a)) per row for logits that are products; the equations stand in `reference/linear_kl.py`.

For ROWS rows at a time torch's products fill float32 blocks [ROWS, V], one a head, and kernels read them, a program a row:

    row_kl          max, Σ exp and argmax of both heads, then the KL; bias, scale and softcap applied on the way    two reads
    row_gradient    dKL / d(product of a) over the block of a, from which products make the gradients of u, v and c
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from chassis_kernels import backends
from chassis_kernels.reference.precision import without_autocast
from chassis_kernels.triton.products import product
from chassis_kernels.triton.shared import LOG2E, launch, online, tanh

OP = "linear_kl"
ROWS = 256


@triton.jit
def logits_of(z, bias, c, o, m, scale, softcap):
    """cap(scale (z + bias + c)) at places o; -inf outside the mask."""
    b_z = tl.load(z + o, mask=m, other=0.0).to(tl.float32)
    if bias is not None:
        b_z += tl.load(bias + o, mask=m, other=0.0).to(tl.float32)
    if c is not None:
        b_z += tl.load(c + o, mask=m, other=0.0).to(tl.float32)
    b_z *= scale
    if softcap is not None:
        b_z = softcap * tanh(b_z / softcap)
    return tl.where(m, b_z, -float("inf"))


@triton.jit
def row_kl(
    a,  # [N, V]
    b,  # [N, V]
    bias_a,  # [V], or None
    bias_b,
    c,
    kl,  # [N] out, and the others
    max_a,
    total_a,  # Σ exp(a - max)
    argmax_a,
    max_b,
    total_b,
    argmax_b,
    stride_a,
    stride_b,
    width,
    scale_a,
    scale_b,
    softcap_a,
    softcap_b,
    log2e,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    a, b = a + row * stride_a, b + row * stride_b
    best_a, sum_a, best_b, sum_b = -float("inf"), 0.0, -float("inf"), 0.0
    column_a, column_b = 0, 0
    for start in range(0, width, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_z = logits_of(a, bias_a, c, o, o < width, scale_a, softcap_a)
        here, place = tl.max(b_z, 0, return_indices=True)
        column_a = tl.where(here > best_a, start + place, column_a)
        best_a, sum_a = online(best_a, sum_a, b_z, log2e)
        b_z = logits_of(b, bias_b, None, o, o < width, scale_b, softcap_b)
        here, place = tl.max(b_z, 0, return_indices=True)
        column_b = tl.where(here > best_b, start + place, column_b)
        best_b, sum_b = online(best_b, sum_b, b_z, log2e)
    shift, p_scale = tl.log(sum_a) - tl.log(sum_b), tl.div_rn(1.0, sum_b)
    b_kl = tl.zeros([BLOCK], tl.float32)
    tiles = tl.cdiv(width, BLOCK)
    for i in range(0, tiles):
        o = (tiles - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        b_a = logits_of(a, bias_a, c, o, o < width, scale_a, softcap_a) - best_a
        b_b = logits_of(b, bias_b, None, o, o < width, scale_b, softcap_b) - best_b
        b_term = tl.exp2(b_b * log2e) * p_scale * (b_b - b_a + shift)
        b_term = tl.where(b_a == -float("inf"), float("inf"), b_term)  # not 0 · inf, where exp underflows
        b_kl += tl.where(b_b == -float("inf"), 0.0, b_term)
    value = tl.where((sum_a > 0) & (sum_b > 0), tl.sum(b_kl, 0), float("nan"))
    tl.store(kl + row, value)
    tl.store(max_a + row, best_a)
    tl.store(total_a + row, sum_a)
    tl.store(argmax_a + row, tl.minimum(column_a, width - 1))
    tl.store(max_b + row, best_b)
    tl.store(total_b + row, sum_b)
    tl.store(argmax_b + row, tl.minimum(column_b, width - 1))


@triton.jit
def row_gradient(
    a,  # [N, V], replaced by the gradient
    b,  # [N, V]
    bias_a,  # [V], or None
    bias_b,
    c,
    grad,  # [N] float32
    lse_a,  # [2, N] float32: the log-sum-exp and what float32 leaves of it
    lse_b,
    n_rows,
    stride_a,
    stride_b,
    width,
    scale_a,
    scale_b,
    softcap_a,
    softcap_b,
    log2e,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    a, b = a + row * stride_a, b + row * stride_b
    high_a, low_a = tl.load(lse_a + row), tl.load(lse_a + n_rows + row)
    high_b, low_b = tl.load(lse_b + row), tl.load(lse_b + n_rows + row)
    upstream = tl.load(grad + row) * scale_a
    for start in range(0, width, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_a = logits_of(a, bias_a, c, o, o < width, scale_a, softcap_a)
        b_b = logits_of(b, bias_b, None, o, o < width, scale_b, softcap_b)
        b_grad = tl.exp2((b_a - high_a - low_a) * log2e) - tl.exp2((b_b - high_b - low_b) * log2e)
        if softcap_a is not None:
            b_a /= softcap_a
            b_grad *= 1 - b_a * b_a
        tl.store(a + o, b_grad * upstream, mask=o < width)


@without_autocast
def linear_kl(*inputs) -> tuple[Tensor, ...]:
    n, rest = inputs[0].shape[0], _arguments(inputs)
    kl, max_a, total_a, max_b, total_b = (inputs[0].new_empty(n, dtype=torch.float32) for _ in range(5))
    argmax_a, argmax_b = (inputs[0].new_empty(n, dtype=torch.int64) for _ in range(2))
    for rows, a, b in _blocks(inputs):
        launch(
            OP, row_kl, lambda meta, a=a: (len(a),), a.shape[1],
            a=a, b=b, kl=kl[rows], max_a=max_a[rows], total_a=total_a[rows], argmax_a=argmax_a[rows], max_b=max_b[rows],
            total_b=total_b[rows], argmax_b=argmax_b[rows], stride_a=a.stride(0), stride_b=b.stride(0), **rest,
        )  # fmt: skip
    lse_a, lse_b = (best.double() + total.double().log() for best, total in ((max_a, total_a), (max_b, total_b)))
    return kl, lse_a, lse_b, argmax_a, argmax_b


@without_autocast
def linear_kl_backward(grad: Tensor, *inputs) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, lse_a, lse_b = inputs
    u, v, c = inputs[6:9]
    grad, rest = grad.float(), _arguments(inputs)
    grad_u, grad_v = grad.new_empty(u.shape), grad.new_zeros(v.shape)
    grad_c = grad.new_zeros(0 if c is None else c.shape)
    for rows, a, b in _blocks(inputs):
        launch(
            OP, row_gradient, lambda meta, a=a: (len(a),), a.shape[1],
            a=a, b=b, grad=grad[rows].contiguous(), lse_a=_split(lse_a[rows]), lse_b=_split(lse_b[rows]), n_rows=len(a),
            stride_a=a.stride(0), stride_b=b.stride(0), **rest,
        )  # fmt: skip
        product(a, v.t(), grad_u[rows])
        product(u[rows].t(), a, grad_v, add=True)
        if c is not None:
            grad_c += a.sum(0)
    return grad_u.to(u.dtype), grad_v.to(v.dtype), grad_c if c is None else grad_c.to(c.dtype)


def _arguments(inputs) -> dict:
    """What is the same for each block of rows."""
    bias_a, bias_b, c = (None if t is None else t.contiguous() for t in (*inputs[4:6], inputs[8]))
    names = "softcap_a", "softcap_b", "scale_a", "scale_b"
    options = dict(zip(names, inputs[9:13], strict=True))
    return {"bias_a": bias_a, "bias_b": bias_b, "c": c, "width": inputs[1].shape[0], "log2e": LOG2E} | options


def _blocks(inputs) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of at most ROWS rows, with the products of their logits a and b, or b as it is given."""
    h_a, W_a, h_b, W_b, _, _, u, v = inputs[:8]
    n, width = h_a.shape[0], W_a.shape[0]
    block_a, block_b = (None if W is None else W.new_empty(min(n, ROWS), width, dtype=torch.float32) for W in (W_a, W_b))
    h_b = h_b if W_b is not None else backends.rows_contiguous(h_b)
    for first in range(0, n, ROWS):
        rows = slice(first, min(first + ROWS, n))
        size = rows.stop - first
        a = product(h_a[rows], W_a.t(), block_a[:size])
        if u is not None:
            product(u[rows], v, a, add=True)
        yield rows, a, h_b[rows] if W_b is None else product(h_b[rows], W_b.t(), block_b[:size])


def _split(x: Tensor) -> Tensor:
    """Float64 [n] as two rows of float32 whose sum it is."""
    high = x.float()
    return torch.stack([high, torch.where(high.isfinite(), x - high, 0.0).float()])
