"""projection_kl's kernels over rows of logits: each row's softmax on the way in, its gradient on the way out.

    student_statistics   max z, 1 / Σ exp((z - max) / τ), and at the label: nll, 1 / Σ exp(z - max)       one read
    teacher_statistics   the same over the columns J, or over the vocabulary, with the share outside J
    gradient             p / τ (back - Σ p back) + grad_nll (p₁ - [label]), which may replace the logits

`gradient` reads a row twice, the second time from its end, which is still in the cache, and writes it once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from chassis_kernels.triton.shared import online


@triton.jit
def student_statistics(
    logits,  # [N, >= width]
    chunk,  # [N], -1: not compared
    labels,  # [N], -1: none; or None
    row_max,  # [N] out, and the others
    row_scale,
    nll,
    ce_scale,
    stride,
    width,
    scale,  # log2(e) / temperature
    log2e,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    compared = tl.load(chunk + row) >= 0
    label = tl.load(labels + row) if labels is not None else -1
    best, total, total_1 = -float("inf"), 0.0, 0.0
    p_scale, p_scale_1, value = 0.0, 0.0, 0.0
    if compared | (label >= 0):
        for start in range(0, width, BLOCK):
            o = start + tl.arange(0, BLOCK)
            b_z = tl.load(logits + row * stride + o, mask=o < width, other=-float("inf")).to(tl.float32)
            if labels is not None:
                _, total_1 = online(best, total_1, b_z, log2e)
            best, total = online(best, total, b_z, scale)
        p_scale = tl.where(compared, tl.div_rn(1.0, total), 0.0)
        if labels is not None:
            z_label = tl.load(logits + row * stride + tl.maximum(label, 0)).to(tl.float32)
            value = tl.where(label >= 0, tl.log(total_1) - (z_label - best), 0.0)
            p_scale_1 = tl.where(label >= 0, tl.div_rn(1.0, total_1), 0.0)
    else:
        best = 0.0
    tl.store(row_max + row, best)
    tl.store(row_scale + row, p_scale)
    if labels is not None:
        tl.store(nll + row, value)
        tl.store(ce_scale + row, p_scale_1)


@triton.jit
def teacher_statistics(
    logits,  # [N, V]
    chunk,  # [N], -1: not compared
    columns,  # [size] ids to sum over; or None: all of them
    inside,  # [V] bool, which ids are in J; or None
    row_max,  # [N] out, and the others
    row_scale,  # 1 / Σ exp((z - max) / τ)
    outside_mass,  # the share of the ids not inside
    stride,
    size,
    scale,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    best, total, rest = -float("inf"), 0.0, 0.0
    if tl.load(chunk + row) >= 0:
        for start in range(0, size, BLOCK):
            o = start + tl.arange(0, BLOCK)
            m = o < size
            if columns is not None:
                place = tl.load(columns + o, mask=m, other=0)
            else:
                place = o
            b_z = tl.load(logits + row * stride + place, mask=m, other=-float("inf")).to(tl.float32)
            if inside is not None:
                m_in = tl.load(inside + o, mask=m, other=1).to(tl.int1)
                b_out = tl.where(m_in, -float("inf"), b_z)
                new = tl.maximum(best, tl.max(b_z, 0))
                rest = rest * tl.exp2((best - new) * scale) + tl.sum(tl.exp2((b_out - new) * scale), 0)
            best, total = online(best, total, b_z, scale)
        tl.store(row_max + row, best)
        tl.store(row_scale + row, tl.div_rn(1.0, total))
        if inside is not None:
            tl.store(outside_mass + row, rest / total)


@triton.jit
def gradient(
    logits,  # [N, >= width]
    out,  # [N, head], may be the logits
    chunk,  # [N]
    slot,  # [width] int32, the place of a token in U, or -1
    back,  # [C, U] float32
    row_max,  # [N]
    row_scale,  # [N], 0: not compared
    labels,  # [N], or None with the next two
    ce_scale,  # [N]
    grad_nll,  # [N]
    stride,
    out_stride,
    width,
    head,
    n_used,
    inverse,  # 1 / temperature
    scale,  # log2(e) / temperature
    log2e,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    best, p_scale = tl.load(row_max + row), tl.load(row_scale + row)
    base = back + tl.maximum(tl.load(chunk + row), 0) * n_used
    g = tl.load(grad_nll + row) if labels is not None else 0.0
    compared = tl.where(p_scale != 0, width, 0)  # how many logits have a KL gradient: all or none
    labelled = tl.where(g != 0, width, 0)
    b_dot = tl.zeros([BLOCK], tl.float32)
    for start in range(0, compared, BLOCK):
        o = start + tl.arange(0, BLOCK)
        place = tl.load(slot + o, mask=o < width, other=-1)
        b_z = tl.load(logits + row * stride + o, mask=o < width, other=-float("inf")).to(tl.float32)
        b_back = tl.load(base + place, mask=place >= 0, other=0.0)
        b_dot += tl.exp2((b_z - best) * scale) * b_back
    dot = tl.sum(b_dot, 0) * p_scale
    tiles = tl.cdiv(head, BLOCK)
    for i in range(0, tiles):
        o = (tiles - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        b_z = tl.load(logits + row * stride + o, mask=o < tl.maximum(compared, labelled), other=-float("inf")).to(tl.float32)
        place = tl.load(slot + o, mask=o < compared, other=-1)
        b_back = tl.load(base + place, mask=place >= 0, other=0.0)
        b_p = tl.exp2((b_z - best) * scale) * p_scale * inverse
        b_grad = tl.where(o < compared, b_p * (b_back - dot), 0.0)
        if labels is not None:
            b_p = tl.exp2((b_z - best) * log2e) * tl.load(ce_scale + row)
            b_grad += tl.where(o < labelled, g * (b_p - tl.where(o == tl.load(labels + row), 1.0, 0.0)), 0.0)
        tl.store(out + row * out_stride + o, b_grad.to(out.dtype.element_ty), mask=o < head)
