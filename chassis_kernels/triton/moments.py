"""Merging a batch of rows into centred second moments; the equations stand in `reference/moments.py`.

    column_sums   Σ w x and max |x| over parts of the rows: the batch's means m, in float64
    products      Σ w (x - c)ᵀ(y - c) with c near m by tiles: the upper triangle of XᵀX and YᵀY, all of XᵀY
    add_parts     where the rows are split: the splits' tiles added up, always in the same order

A program takes one tile after the other. Rows are centred in float32 while they are loaded, SLAB of them are summed in
float32, and a slab's sum is added to the float64 state, with f dᵀd - n2 (m - c)ᵀ(m - c) beside the first. Rows of weight 0
are not read.

A float32 is three bfloat16 to the tensor cores, and six products keep its digits: with c = float32(m) that is how rows are
multiplied. bfloat16 rows without weights need four: c is m rounded to 12 bits below max |x|, so that x - c has no digit
below the 16 of two bfloat16 (but for an x that is less than 2⁻⁹ c). Leaving out the product of the two lower parts would put
the diagonal tens of float32 roundings too low.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chassis_kernels import backends
from chassis_kernels.triton.shared import dot, launch

OP = "moments"
PROGRAMS = 264  # that run at once, two on each processor of a large GPU
PART = 4096  # rows of a split at least, and rows of a partial column sum
SLAB = tl.constexpr(2048)  # a multiple of every ROWS


@triton.jit
def column_sums(
    x,  # [N, D]
    weight,  # [N] float32, or None
    sums,  # [parts, D] float64 out
    peaks,  # [parts, D] float32 out, max |x|
    n,
    width,
    stride,
    part_rows,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part = tl.program_id(1).to(tl.int64)
    o_d = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_sum, b_peak = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float32)
    last = tl.minimum((part + 1) * part_rows, n)
    for first in range(part * part_rows, last, ROWS):
        o_n = (first + tl.arange(0, ROWS)).to(tl.int64)
        b_w = weights(weight, o_n, o_n < last)
        m_x = (b_w != 0)[:, None] & (o_d < width)[None, :]
        b_x = tl.load(x + o_n[:, None] * stride + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_sum += tl.sum(b_x.to(tl.float64) * b_w.to(tl.float64)[:, None], 0)
        b_peak = tl.maximum(b_peak, tl.max(tl.abs(b_x), 0))
    tl.store(sums + part * width + o_d, b_sum, mask=o_d < width)
    tl.store(peaks + part * width + o_d, b_peak, mask=o_d < width)


@triton.jit
def weights(weight, o_n, m_n):
    """Weights of rows o_n, 1 where none are given and 0 outside the mask."""
    if weight is None:
        b_w = tl.where(m_n, 1.0, 0.0)
    else:
        b_w = tl.load(weight + o_n, mask=m_n, other=0.0)
    return b_w


@triton.jit
def centred(x, centre, o_n, o_d, m_n, width, stride):
    """[ROWS, BLOCK] of x - c, 0 outside."""
    m_x = m_n[:, None] & (o_d < width)[None, :]
    b_x = tl.load(x + o_n[:, None] * stride + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    return tl.where(m_x, b_x - tl.load(centre + o_d, mask=o_d < width, other=0.0)[None, :], 0.0)


@triton.jit
def halves(x):
    """The two bfloat16 whose sum is nearest to x."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def upper_tile(t):
    """Row and column of the t-th tile of an upper triangle, column by column."""
    j = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int64)
    j = tl.where(j * (j + 1) // 2 > t, j - 1, j)  # float32 may be one off
    j = tl.where((j + 1) * (j + 2) // 2 <= t, j + 1, j)
    return t - j * (j + 1) // 2, j


@triton.jit
def rank_one(factor, shift_a, shift_b, total, residue_a, residue_b, o_a, o_b, width_a, width_b):
    """f d_aᵀ d_b - n2 (m_a - c_a)ᵀ (m_b - c_b), [A, B] float64."""
    b_a, b_b = tl.load(shift_a + o_a, mask=o_a < width_a, other=0.0), tl.load(shift_b + o_b, mask=o_b < width_b, other=0.0)
    b_ra, b_rb = (
        tl.load(residue_a + o_a, mask=o_a < width_a, other=0.0),
        tl.load(residue_b + o_b, mask=o_b < width_b, other=0.0),
    )
    return tl.load(factor) * b_a[:, None] * b_b[None, :] - tl.load(total) * b_ra[:, None] * b_rb[None, :]


@triton.jit
def products(
    a,  # [N, A]
    b,  # [N, B]
    weight,  # [N] float32, or None
    centre_a,  # [A] float32
    centre_b,
    shift_a,  # [A] float64, and residue
    shift_b,
    residue_a,
    residue_b,
    factor,  # [1] float64
    total,
    out,  # [A, B] float64, added to
    parts,  # [splits, A, B] float64 instead, or None
    n,
    width_a,
    width_b,
    stride_a,
    stride_b,
    splits,
    split_rows,
    UPPER: tl.constexpr,
    HALVES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles_a, tiles_b = tl.cdiv(width_a, BLOCK), tl.cdiv(width_b, BLOCK)
    tiles = tiles_a * tiles_b
    if UPPER:
        tiles = tiles_b * (tiles_b + 1) // 2
    for job in range(tl.program_id(0).to(tl.int64), tiles * splits, tl.num_programs(0)):
        tile, split = job % tiles, job // tiles
        i, j = tile // tiles_b, tile % tiles_b
        if UPPER:
            i, j = upper_tile(tile)
        o_a, o_b = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
        m = (o_a < width_a)[:, None] & (o_b < width_b)[None, :]
        if UPPER:
            m &= o_a[:, None] <= o_b[None, :]
        o = o_a[:, None] * width_b + o_b[None, :]
        begin, last = split * split_rows, tl.minimum((split + 1) * split_rows, n)
        for slab in range(begin, last, SLAB):
            b_sum = tl.zeros([BLOCK, BLOCK], tl.float32)
            for first in range(slab, tl.minimum(slab + SLAB, last), ROWS):
                o_n = (first + tl.arange(0, ROWS)).to(tl.int64)
                b_w = weights(weight, o_n, o_n < last)
                b_a = centred(a, centre_a, o_n, o_a, b_w != 0, width_a, stride_a) * b_w[:, None]
                b_b = centred(b, centre_b, o_n, o_b, b_w != 0, width_b, stride_b)
                if HALVES:
                    b_ha, b_la = halves(b_a)
                    b_hb, b_lb = halves(b_b)
                    b_sum = dot(tl.trans(b_la), b_lb, b_sum)
                    b_sum = dot(tl.trans(b_la), b_hb, b_sum)
                    b_sum = dot(tl.trans(b_ha), b_lb, b_sum)
                    b_sum = dot(tl.trans(b_ha), b_hb, b_sum)
                else:
                    b_sum = dot(tl.trans(b_a), b_b, b_sum)
            b_total = b_sum.to(tl.float64)
            if parts is None:
                if slab == 0:
                    b_total += rank_one(factor, shift_a, shift_b, total, residue_a, residue_b, o_a, o_b, width_a, width_b)
                tl.store(out + o, tl.load(out + o, mask=m, other=0.0) + b_total, mask=m)
            else:
                p = parts + split * width_a * width_b + o
                if slab > begin:
                    b_total += tl.load(p, mask=m, other=0.0)
                tl.store(p, b_total, mask=m)


@triton.jit
def add_parts(
    parts,  # [splits, A, B] float64
    out,  # [A, B] float64, added to
    shift_a,
    shift_b,
    residue_a,
    residue_b,
    factor,
    total,
    width_a,
    width_b,
    splits,
    UPPER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_a = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_b = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = (o_a < width_a)[:, None] & (o_b < width_b)[None, :]
    if UPPER:
        m &= o_a[:, None] <= o_b[None, :]
    o = o_a[:, None] * width_b + o_b[None, :]
    b_sum = tl.load(out + o, mask=m, other=0.0)
    b_sum += rank_one(factor, shift_a, shift_b, total, residue_a, residue_b, o_a, o_b, width_a, width_b)
    for split in range(0, splits):
        b_sum += tl.load(parts + (split + tl.zeros([1], tl.int64)) * width_a * width_b + o, mask=m, other=0.0)
    tl.store(out + o, b_sum, mask=m)


class Side:
    """x or y: its rows, what the batch does to its mean, and the float32 near the mean that rows are centred by."""

    def __init__(self, rows: Tensor, mean: Tensor, weight: Tensor | None, total: Tensor) -> None:
        self.rows, (n, self.width) = backends.rows_contiguous(rows), rows.shape
        parts = triton.cdiv(n, PART)
        sums, peaks = mean.new_empty(parts, self.width), mean.new_empty(parts, self.width, dtype=torch.float32)
        launch(
            OP, column_sums, lambda meta: (triton.cdiv(self.width, meta["BLOCK"]), parts), self.width,
            x=self.rows, weight=weight, sums=sums, peaks=peaks, n=n, width=self.width, stride=self.rows.stride(0),
            part_rows=PART,
        )  # fmt: skip
        own = sums.sum(0) / total
        self.halves = self.rows.dtype == torch.bfloat16 and weight is None
        self.shift, self.centre = own - mean, own.float()
        if self.halves:
            unit = torch.exp2(torch.frexp(peaks.amax(0)).exponent.double() - 12)
            self.centre = ((own / unit).round() * unit).float()
        self.residue = own - self.centre.double()


def moments_update_(*columns: list[Tensor]) -> None:
    """One layer after the other; for what no layer has, the list is empty. The arguments of `update_layer`."""
    columns = tuple(column or [None] * len(columns[0]) for column in columns)
    for layer in zip(*columns, strict=True):
        update_layer(*layer)


def update_layer(count, mean_x, xx, mean_y, xy, yy, x, y, weight) -> None:
    n = len(x)
    weight = None if weight is None else weight.float().contiguous()
    total = count.new_full((1,), n) if weight is None else weight.sum(dtype=torch.float64).view(1)
    if n == 0:
        return
    safe = torch.where(total > 0, total, 1.0)  # with weights of 0 alone all sums are 0: nothing changes
    both = count + safe
    terms = {"factor": count * total / both, "total": total}
    side_x = Side(x, mean_x, weight, safe)
    side_x.shift *= total > 0
    outputs = [(side_x, side_x, xx)]
    if y is not None:
        side_y = Side(y, mean_y, weight, safe)
        side_y.shift *= total > 0
        outputs.append((side_x, side_y, xy))
        if yy.dim() == 2:
            outputs.append((side_y, side_y, yy))
        else:
            _squares(side_y, yy, weight, terms)
        mean_y += side_y.shift * (total / both)
    for a, b, out in outputs:
        _add_products(a, b, out, weight, terms)
    mean_x += side_x.shift * (total / both)
    count += total[0]


def _add_products(a: Side, b: Side, out: Tensor, weight: Tensor | None, terms: dict[str, Tensor]) -> None:
    n, upper = len(a.rows), a is b
    blocks = triton.cdiv(a.width, 64) * triton.cdiv(b.width, 64) // (2 if upper else 1)
    splits = max(1, min(triton.cdiv(n, PART), PROGRAMS // max(blocks, 1)))
    split_rows = triton.cdiv(triton.cdiv(n, splits), SLAB.value) * SLAB.value
    splits = triton.cdiv(n, split_rows)
    parts = None if splits == 1 else out.new_empty(splits, *out.shape)
    vectors = {"shift_a": a.shift, "shift_b": b.shift, "residue_a": a.residue, "residue_b": b.residue, **terms}
    shared = {
        "out": out,
        "parts": parts,
        "width_a": a.width,
        "width_b": b.width,
        "splits": splits,
        "UPPER": upper,
        **vectors,
    }
    launch(
        OP, products, lambda meta: (PROGRAMS,), n,
        a=a.rows, b=b.rows, weight=weight, centre_a=a.centre, centre_b=b.centre, n=n, stride_a=a.rows.stride(0),
        stride_b=b.rows.stride(0), split_rows=split_rows, HALVES=a.halves and b.halves, **shared,
    )  # fmt: skip
    if parts is not None:
        launch(
            OP, add_parts,
            lambda meta: (triton.cdiv(a.width, meta["BLOCK"]), triton.cdiv(b.width, meta["BLOCK"])), n, **shared,
        )  # fmt: skip


def _squares(y: Side, yy: Tensor, weight: Tensor | None, terms: dict[str, Tensor]) -> None:
    """The diagonal alone of YᵀY, some rows at a time."""
    yy += terms["factor"] * y.shift.square() - terms["total"] * y.residue.square()
    for first in range(0, len(y.rows), SLAB.value):
        part = slice(first, first + SLAB.value)
        own = None if weight is None else weight[part, None]
        square = (y.rows[part].float() - y.centre).square_()
        if own is not None:
            square = torch.where(own != 0, square * own, 0.0)
        yy += square.sum(0, dtype=torch.float64)
