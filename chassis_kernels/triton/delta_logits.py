"""logits[i, cols_a] += ((hidden_i - mean_a) U_a) V_a + bias_a with a = adapter_id[i], in place, in two launches.

    down   low [splits, N, r] = parts of the width of hidden U - mean U;  beside it, which columns are named twice
    up     every tile of rows and columns: Σ low, times V, plus bias, added to the logits and rounded once

A program takes ROWS rows as they come, and the adapters among them one after the other: nothing is sorted, nothing comes
back to the host. Of columns that repeat the first adds the changes of all. Factors that are both bfloat16 go to the tensor
cores as they are; for logits and V in bfloat16 the product of rank r goes there as two, 16 of its 24 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chassis_kernels import backends
from chassis_kernels.triton.shared import dot, launch

OP = "delta_logits"
PROGRAMS, PART = 128, 256  # few rows: parts of the width, of at least PART, until there are this many programs
ALONE, FIRST, LATER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def adapters_of(adapter_id, o_n, n, adapters):
    """The adapters of rows o_n; negative for none, for ids out of range and past the last row."""
    if adapter_id is None:
        b_id = tl.where(o_n < n, 0, -1).to(tl.int64)
    else:
        b_id = tl.load(adapter_id + o_n, mask=o_n < n, other=-1)
        b_id = tl.where(b_id < adapters, b_id, -1)
    return b_id


@triton.jit
def down(
    hidden,  # [N, D]
    U,  # [A, D, r]
    mean,  # [A, D], or None
    adapter_id,  # [N] int64, or None
    cols,  # [lists, K] int64, or None
    low,  # [splits, N, r] float32 out
    copies,  # [lists, K] uint8 out
    n,
    width,
    rank,
    columns,
    vocabulary,
    adapters,
    splits,
    hidden_stride,
    U_stride,  # between adapters
    U_row,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
    COLS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    rank_tiles = tl.cdiv(rank, RANKS)
    tiles = tl.cdiv(n, ROWS) * rank_tiles * splits
    if program < tiles:
        part, tile = program % splits, program // splits
        o_n = tile // rank_tiles * ROWS + tl.arange(0, ROWS)
        o_r = tile % rank_tiles * RANKS + tl.arange(0, RANKS)
        m_r = o_r < rank
        each = tl.cdiv(width, splits)
        last = tl.minimum(width, (part + 1) * each)
        b_id = adapters_of(adapter_id, o_n, n, adapters)
        b_low = tl.zeros([ROWS, RANKS], tl.float32)
        b_left, a = b_id, tl.max(b_id, 0)
        while a >= 0:
            b_mean = tl.zeros([RANKS], tl.float32)
            for start in range(part * each, last, DEPTH):
                o_d = start + tl.arange(0, DEPTH)
                m_h = (b_id == a)[:, None] & (o_d < last)[None, :]
                b_h = tl.load(hidden + o_n[:, None] * hidden_stride + o_d[None, :], mask=m_h, other=0.0)
                m_u = (o_d < last)[:, None] & m_r[None, :]
                b_u = tl.load(U + a * U_stride + o_d[:, None] * U_row + o_r[None, :], mask=m_u, other=0.0)
                if mean is not None:
                    b_m = tl.load(mean + a * width + o_d, mask=o_d < last, other=0.0).to(tl.float32)
                    if b_h.dtype == tl.bfloat16 and b_u.dtype == tl.bfloat16:
                        b_mean += tl.sum(b_m[:, None] * b_u.to(tl.float32), 0)
                    else:
                        b_h = tl.where(m_h, b_h.to(tl.float32) - b_m[None, :], 0.0)
                b_low = dot(b_h, b_u, b_low)
            b_low -= tl.where((b_id == a)[:, None], b_mean[None, :], 0.0)
            b_left = tl.where(b_left == a, -1, b_left)
            a = tl.max(b_left, 0)
        tl.store(low + (part * n + o_n)[:, None] * rank + o_r[None, :], b_low, mask=(o_n < n)[:, None] & m_r[None, :])
    elif cols is not None:
        mark_copies(cols, copies, program - tiles, columns, vocabulary, COLS)


@triton.jit
def ids_at(cols, o_k, columns, vocabulary):
    """Columns as int32, -1 for those out of range."""
    b_c = tl.load(cols + o_k, mask=o_k < columns, other=-1)
    return tl.where((b_c >= 0) & (b_c < vocabulary), b_c, -1).to(tl.int32)


@triton.jit
def mark_copies(cols, copies, tile, columns, vocabulary, COLS: tl.constexpr):
    """For each column of a tile: ALONE, FIRST of those that name the same logit, or LATER; so also where it names none."""
    column_tiles = tl.cdiv(columns, COLS)
    cols, copies = cols + tile // column_tiles * columns, copies + tile // column_tiles * columns
    o_k = tile % column_tiles * COLS + tl.arange(0, COLS)
    b_c = ids_at(cols, o_k, columns, vocabulary)
    b_earlier, b_later = tl.zeros([COLS], tl.int32), tl.zeros([COLS], tl.int32)
    for start in range(0, columns, COLS):
        o_s = start + tl.arange(0, COLS)
        b_s = ids_at(cols, o_s, columns, vocabulary)
        b_same = b_s[None, :] == b_c[:, None]
        b_earlier = tl.maximum(b_earlier, tl.max((b_same & (o_s[None, :] < o_k[:, None])).to(tl.int32), 1))
        b_later = tl.maximum(b_later, tl.max((b_same & (o_s[None, :] > o_k[:, None])).to(tl.int32), 1))
    b_code = tl.where((b_c < 0) | (b_earlier > 0), LATER, tl.where(b_later > 0, FIRST, ALONE))
    tl.store(copies + o_k, b_code.to(tl.uint8), mask=o_k < columns)


@triton.jit
def change(
    low, V, bias, a, o_n, o_k, n, rank, columns, splits, V_stride, V_row, TWO: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLS] of Σ low V_a + bias_a; low as TWO bfloat16 or in float32."""
    m_k = o_k < columns
    b_change = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, rank, RANKS):
        o_r = start + tl.arange(0, RANKS)
        m_low = (o_n < n)[:, None] & (o_r < rank)[None, :]
        b_low = tl.zeros([ROWS, RANKS], tl.float32)
        for part in range(0, splits):
            b_low += tl.load(low + (part * n + o_n)[:, None] * rank + o_r[None, :], mask=m_low, other=0.0)
        m_v = (o_r < rank)[:, None] & m_k[None, :]
        b_v = tl.load(V + a * V_stride + o_r[:, None] * V_row + o_k[None, :], mask=m_v, other=0.0)
        if TWO:
            b_high = b_low.to(tl.bfloat16)
            b_rest = b_low - b_high.to(tl.float32)
            b_rest = tl.where(b_rest - b_rest == 0, b_rest, 0.0)  # nothing is left of an infinity
            b_change = dot(b_rest.to(tl.bfloat16), b_v, dot(b_high, b_v, b_change))
        else:
            b_change = dot(b_low, b_v, b_change)
    if bias is not None:
        b_change += tl.load(bias + a * columns + o_k, mask=m_k, other=0.0).to(tl.float32)[None, :]
    return b_change


@triton.jit
def up(
    logits,  # [N, vocabulary], changed
    low,  # [splits, N, r] float32
    V,  # [A, r, K]
    bias,  # [A, K], or None
    cols,  # [lists, K] int64, or None
    copies,  # [lists, K] uint8
    adapter_id,  # [N] int64, or None
    n,
    rank,
    columns,
    adapters,
    splits,
    stride,
    V_stride,  # between adapters
    V_row,
    cols_stride,  # between adapters, 0 where they share one list
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
):
    column_tile = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_k = column_tile * COLS + tl.arange(0, COLS)
    b_id = adapters_of(adapter_id, o_n, n, adapters)
    b_left, a = b_id, tl.max(b_id, 0)
    TWO: tl.constexpr = logits.dtype.element_ty == tl.bfloat16 and V.dtype.element_ty == tl.bfloat16
    while a >= 0:
        b_c, m_k, repeated, last = o_k, o_k < columns, False, column_tile + 1
        if cols is not None:
            own, code = cols + a * cols_stride, copies + a * cols_stride
            b_c = tl.load(own + o_k, mask=m_k, other=-1)
            b_code = tl.load(code + o_k, mask=m_k, other=LATER)
            m_k = b_code != LATER
            repeated = tl.max((b_code == FIRST).to(tl.int32), 0) > 0
            last = tl.where(repeated, tl.cdiv(columns, COLS), last)
        b_change = tl.zeros([ROWS, COLS], tl.float32)
        for tile in range(column_tile, last):
            o_2 = tile * COLS + tl.arange(0, COLS)
            more = False
            if cols is not None:
                b_code = tl.load(code + o_2, mask=o_2 < columns, other=ALONE)
                more = tl.max((b_code == LATER).to(tl.int32), 0) > 0
            if more or tile == column_tile:
                b_2 = change(low, V, bias, a, o_n, o_2, n, rank, columns, splits, V_stride, V_row, TWO, ROWS, COLS, RANKS)
                b_change += tl.where(tile == column_tile, b_2, 0.0)
                if cols is not None:
                    if more and repeated:
                        for k in range(tile * COLS, tl.minimum((tile + 1) * COLS, columns)):
                            b_one = tl.sum(tl.where((o_2 == k)[None, :], b_2, 0.0), 1)
                            m_same = (b_c == tl.load(own + k)) & (o_k < k)
                            b_change += tl.where(m_same[None, :], b_one[:, None], 0.0)
        p = logits + o_n[:, None] * stride + b_c[None, :]
        m = (b_id == a)[:, None] & m_k[None, :]
        b_z = tl.load(p, mask=m, other=0.0).to(tl.float32) + b_change
        tl.store(p, b_z.to(logits.dtype.element_ty), mask=m)
        b_left = tl.where(b_left == a, -1, b_left)
        a = tl.max(b_left, 0)


def delta_logits_(logits, hidden, U, V, bias, mean, cols, adapter_id) -> None:
    n, columns = len(logits), V.shape[-1]
    if n == 0 or columns == 0:
        return
    out, hidden, U, V = map(backends.rows_contiguous, (logits, hidden, U, V))
    U, V = (t if t.dim() == 3 else t[None] for t in (U, V))
    bias, mean, cols, adapter_id = (None if t is None else t.contiguous() for t in (bias, mean, cols, adapter_id))
    adapters, width, rank = U.shape
    splits = max(1, min(triton.cdiv(width, PART), PROGRAMS // triton.cdiv(n, 16)))
    low = out.new_empty(splits, n, rank, dtype=torch.float32)
    lists = 0 if cols is None else cols.numel() // columns
    copies = None if cols is None else cols.new_empty(cols.shape, dtype=torch.uint8)
    shared = {"low": low, "cols": cols, "copies": copies, "adapter_id": adapter_id, "n": n, "rank": rank, "columns": columns}
    shared |= {"adapters": adapters, "splits": splits}

    def programs(meta):
        products = triton.cdiv(n, meta["ROWS"]) * triton.cdiv(rank, meta["RANKS"]) * splits
        return (products + lists * triton.cdiv(columns, meta["COLS"]),)

    launch(
        OP, down, programs, n, hidden=hidden, U=U, mean=mean, width=width, vocabulary=out.shape[1],
        hidden_stride=hidden.stride(0), U_stride=U.stride(0), U_row=U.stride(1), **shared,
    )  # fmt: skip
    launch(
        OP, up, lambda meta: (triton.cdiv(columns, meta["COLS"]), triton.cdiv(n, meta["ROWS"])), n,
        logits=out, V=V, bias=bias, stride=out.stride(0), V_stride=V.stride(0), V_row=V.stride(1),
        cols_stride=columns if lists > 1 else 0, **shared,
    )  # fmt: skip
    if out is not logits:
        logits.copy_(out)
    torch.autograd.graph.increment_version(logits)


def delta_logits(logits: Tensor, *arguments: Tensor | None) -> Tensor:
    out = logits.clone()
    delta_logits_(out, *arguments)
    return out
