"""The k columns of teacher logits that reach the largest value in any row: one read of the logits.

    best[part, v] = max over the kept rows t of a part of z[t, v];  columns = the k largest max over parts, lowest ids first

Parts of the rows give a GPU enough programs; a maximum is the same in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chassis_kernels import backends
from chassis_kernels.reference import projection_kl as reference
from chassis_kernels.triton.shared import MINUS_INFINITY, launch

PART_ROWS = 256


@triton.jit
def column_maxima(
    logits,  # [N, V]
    keep,  # [N] bool, or None
    best,  # [parts, V] float32
    n_rows,
    width,
    stride,
    part_rows,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(1).to(tl.int64) * part_rows
    last = tl.minimum(first + part_rows, n_rows)
    o_v = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_v = o_v < width
    b_best = tl.full([BLOCK], MINUS_INFINITY, tl.float32)
    for row in range(first, last, ROWS):
        o_t = (row + tl.arange(0, ROWS)).to(tl.int64)
        m_t = o_t < last
        if keep is not None:
            m_t = m_t & tl.load(keep + o_t, mask=m_t, other=0).to(tl.int1)
        b_z = tl.load(logits + o_t[:, None] * stride + o_v[None, :], mask=m_t[:, None] & m_v[None, :], other=MINUS_INFINITY)
        b_best = tl.maximum(b_best, tl.max(b_z.to(tl.float32), 0))
    tl.store(best + tl.program_id(1).to(tl.int64) * width + o_v, b_best, mask=m_v)


def top_columns(teacher: Tensor, keep: Tensor | None, k: int) -> Tensor:
    n_rows, width = teacher.shape
    teacher = backends.rows_contiguous(teacher)
    parts = max(1, triton.cdiv(n_rows, PART_ROWS))
    best = teacher.new_empty(parts, width, dtype=torch.float32)
    launch(
        "top_columns", column_maxima, lambda meta: (triton.cdiv(width, meta["BLOCK"]), parts), width,
        logits=teacher, keep=None if keep is None else keep.contiguous(), best=best,
        n_rows=n_rows, width=width, stride=teacher.stride(0), part_rows=PART_ROWS,
    )  # fmt: skip
    return reference.top_columns(best, None, k)
