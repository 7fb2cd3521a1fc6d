"""projection_kl's sums: over the rows of a chunk, and over the edges of the projection.

    chunk_means     means[c, i] = mean over the rows t of chunk c of p_t[ids[i]], or of log p_t[ids[i]]
    weighted_sums   sums[s, c] = Σ over the edges e of s of weights[e] values[index[e], c]

`weighted_sums` has the chunks side by side, so that an edge costs whole lines wherever its row lies.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk_means(
    logits,  # [N, V]
    ids,  # [size], which columns of the logits
    members,  # rows, chunk by chunk
    first,  # [C + 1], where each chunk's members start
    row_max,  # [N]
    row_scale,  # [N]
    means,  # [C, size] float32, out
    stride,
    size,
    inverse,  # 1 / temperature
    scale,  # log2(e) / temperature
    count_eps,
    LOG: tl.constexpr,  # mean of log-probabilities, else of probabilities
    BLOCK: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    column = tl.load(ids + o, mask=m, other=0)
    begin, end = tl.load(first + c), tl.load(first + c + 1)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i in range(begin, end):
        row = tl.load(members + i)
        b_z = tl.load(logits + row * stride + column, mask=m, other=0.0).to(tl.float32) - tl.load(row_max + row)
        if LOG:
            b_sum += b_z * inverse + tl.log(tl.load(row_scale + row))
        else:
            b_sum += tl.exp2(b_z * scale) * tl.load(row_scale + row)
    tl.store(means + c * size + o, b_sum / ((end - begin).to(tl.float32) + count_eps), mask=m)


@triton.jit
def weighted_sums(
    values,  # [n, C] float32
    first,  # [S], the edges of each sum
    last,  # [S]
    index,  # [E] int32, which row of the values; or None: the edge's own number
    weights,  # [E] float32; or None: 1
    sums,  # [S, C] float32, out
    n_sums,
    n_chunks,
    SUMS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    o_s = tl.program_id(0).to(tl.int64) * SUMS + tl.arange(0, SUMS)
    o_c = tl.program_id(1).to(tl.int64) * CHUNKS + tl.arange(0, CHUNKS)
    m_s, m_c = o_s < n_sums, o_c < n_chunks
    b_first = tl.load(first + o_s, mask=m_s, other=0)
    b_count = tl.load(last + o_s, mask=m_s, other=0) - b_first
    b_sum = tl.zeros([SUMS, CHUNKS], tl.float32)
    for i in range(0, tl.max(b_count, 0)):
        edge = b_first + i
        m_e = i < b_count
        if index is not None:
            row = tl.load(index + edge, mask=m_e, other=0).to(tl.int64)
        else:
            row = edge
        b_v = tl.load(values + row[:, None] * n_chunks + o_c[None, :], mask=m_e[:, None] & m_c[None, :], other=0.0)
        if weights is not None:
            b_v *= tl.load(weights + edge, mask=m_e, other=0.0)[:, None]
        b_sum += b_v
    tl.store(sums + o_s[:, None] * n_chunks + o_c[None, :], b_sum, mask=m_s[:, None] & m_c[None, :])
