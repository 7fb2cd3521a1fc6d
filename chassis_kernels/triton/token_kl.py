"""KL per row between models that share a tokenizer, over all tokens or within columns; see `reference/token_kl.py`.

    row_kl          each row's max and 1 / Σ exp((z - max) / τ) on both sides, and where it is wanted the KL    two reads
    row_gradient    (p - q) / τ, or reverse p (log p - log q - KL) / τ, which may replace the logits            one read

A program is a row; rows that do not count are not read. KL comes from differences of logits that are relative to their own
maximum, so that equal rows give 0 and an offset costs no digits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chassis_kernels import backends
from chassis_kernels.triton.shared import LOG2E, launch, online

OP = "token_kl"


@triton.jit
def pair(student, teacher, columns, o, m):
    """The logits of both sides at places o, or at the ids that stand there; -inf outside the mask."""
    if columns is not None:
        o = tl.load(columns + o, mask=m, other=0)
    b_z = tl.load(student + o, mask=m, other=-float("inf")).to(tl.float32)
    return b_z, tl.load(teacher + o, mask=m, other=-float("inf")).to(tl.float32)


@triton.jit
def row_kl(
    student,  # [N, V]
    teacher,  # [N, >= V]
    columns,  # [size] int64, or None: the first `size`
    keep,  # [N] bool, or None: all
    student_max,  # [N] out, and the others
    student_scale,
    teacher_max,
    teacher_scale,
    kl,  # or None
    stride,
    teacher_stride,
    size,
    inverse,  # 1 / temperature
    scale,  # log2(e) / temperature
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    value, kept = 0.0, True
    if keep is not None:
        kept = tl.load(keep + row) != 0
    if kept:
        best, total, best_t, total_t = -float("inf"), 0.0, -float("inf"), 0.0
        for start in range(0, size, BLOCK):
            o = start + tl.arange(0, BLOCK)
            b_z, b_t = pair(student + row * stride, teacher + row * teacher_stride, columns, o, o < size)
            best, total = online(best, total, b_z, scale)
            best_t, total_t = online(best_t, total_t, b_t, scale)
        p_scale, q_scale = tl.div_rn(1.0, total), tl.div_rn(1.0, total_t)
        tl.store(student_max + row, best)
        tl.store(student_scale + row, p_scale)
        tl.store(teacher_max + row, best_t)
        tl.store(teacher_scale + row, q_scale)
        if kl is not None:
            shift = tl.log(total) - tl.log(total_t)
            b_kl = tl.zeros([BLOCK], tl.float32)
            tiles = tl.cdiv(size, BLOCK)
            for i in range(0, tiles):
                o = (tiles - 1 - i) * BLOCK + tl.arange(0, BLOCK)
                b_z, b_t = pair(student + row * stride, teacher + row * teacher_stride, columns, o, o < size)
                b_z, b_t = b_z - best, b_t - best_t
                b_ratio = (b_t - b_z) * inverse + shift  # log q - log p
                if REVERSE:
                    b_p = tl.exp2(b_z * scale) * p_scale
                    b_kl -= tl.where(b_p == 0, 0.0, b_p * b_ratio)
                else:
                    b_q = tl.exp2(b_t * scale) * q_scale
                    b_kl += tl.where(b_q == 0, 0.0, b_q * b_ratio)
            value = tl.sum(b_kl, 0)
    if kl is not None:
        tl.store(kl + row, value)


@triton.jit
def row_gradient(
    student,  # [N, V]
    teacher,  # [N, >= V]
    out,  # [N, V], may be the student's
    inside,  # [V] bool, which ids are columns; or None: all
    keep,  # [N] bool, or None: all
    grad,  # [N] float32
    student_max,  # [N]
    student_scale,
    teacher_max,
    teacher_scale,
    kl,  # reverse only
    stride,
    teacher_stride,
    out_stride,
    width,
    inverse,
    scale,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    upstream = tl.load(grad + row)
    kept = upstream != 0
    if keep is not None:
        kept &= tl.load(keep + row) != 0
    count = tl.where(kept, width, 0)
    upstream *= inverse
    best, best_t = tl.load(student_max + row), tl.load(teacher_max + row)
    p_scale, q_scale = tl.load(student_scale + row), tl.load(teacher_scale + row)
    if kl is not None:
        shift, value = tl.log(p_scale) - tl.log(q_scale), tl.load(kl + row)
    for start in range(0, width, BLOCK):
        o = start + tl.arange(0, BLOCK)
        m = o < count
        if inside is not None:
            m &= tl.load(inside + o, mask=m, other=0).to(tl.int1)
        b_z, b_t = pair(student + row * stride, teacher + row * teacher_stride, None, o, m)
        b_z, b_t = b_z - best, b_t - best_t
        b_p = tl.exp2(b_z * scale) * p_scale
        if kl is not None:
            b_slope = tl.where(b_p == 0, 0.0, b_p * ((b_z - b_t) * inverse + shift - value))
        else:
            b_slope = b_p - tl.exp2(b_t * scale) * q_scale
        b_grad = tl.where(m, b_slope * upstream, 0.0)
        tl.store(out + row * out_stride + o, b_grad.to(out.dtype.element_ty), mask=o < width)


def token_kl(*inputs) -> Tensor:
    inputs = _contiguous(*inputs)
    kl = inputs[0].new_empty(len(inputs[0]), dtype=torch.float32)
    _statistics(inputs, kl)
    return kl


def token_kl_backward(grad: Tensor, *inputs) -> Tensor:
    inputs, out = _contiguous(*inputs), torch.empty(inputs[0].shape, dtype=inputs[0].dtype, device=inputs[0].device)
    kl = grad.new_empty(len(out), dtype=torch.float32) if inputs[5] else None
    _gradient(inputs, out, grad, _statistics(inputs, kl), kl)
    return out


def token_kl_(out: Tensor, weight: Tensor, *inputs) -> Tensor:
    inputs = _contiguous(*inputs)
    kl = inputs[0].new_empty(len(out), dtype=torch.float32)
    _gradient(inputs, out, weight, _statistics(inputs, kl), kl if inputs[5] else None)
    return kl


def _contiguous(student, teacher, columns, keep, temperature, reverse) -> tuple:
    logits = (backends.rows_contiguous(t) for t in (student, teacher))
    return *logits, *(None if t is None else t.contiguous() for t in (columns, keep)), temperature, reverse


def _statistics(inputs: tuple, kl: Tensor | None) -> dict[str, Tensor]:
    """Each row's max and 1 / Σ exp on both sides; fills `kl`."""
    student, teacher, columns, keep, temperature, reverse = inputs
    names = "student_max", "student_scale", "teacher_max", "teacher_scale"
    rows = dict(zip(names, student.new_empty(4, len(student), dtype=torch.float32), strict=True))
    size = student.shape[1] if columns is None else len(columns)
    launch(
        OP, row_kl, lambda meta: (len(student),), size,
        student=student, teacher=teacher, columns=columns, keep=keep, **rows, kl=kl, stride=student.stride(0),
        teacher_stride=teacher.stride(0), size=size, inverse=1 / temperature, scale=LOG2E / temperature, REVERSE=reverse,
    )  # fmt: skip
    return rows


def _gradient(inputs: tuple, out: Tensor, grad: Tensor, rows: dict[str, Tensor], kl: Tensor | None) -> None:
    student, teacher, columns, keep, temperature, _ = inputs
    width, inside = student.shape[1], None
    if columns is not None:
        inside = torch.zeros(width, dtype=torch.bool, device=out.device).index_fill_(0, columns, True)
    launch(
        OP, row_gradient, lambda meta: (len(student),), width,
        student=student, teacher=teacher, out=out, inside=inside, keep=keep, grad=grad.float().contiguous(), **rows, kl=kl,
        stride=student.stride(0), teacher_stride=teacher.stride(0), out_stride=out.stride(0), width=width,
        inverse=1 / temperature, scale=LOG2E / temperature,
    )  # fmt: skip
