"""projection_kl between the two sides of a chunk, over k columns and perhaps a tail; see `reference/projection_kl.py`.

    r = a / (Σa + ε), u = r + ε, l = log u, e = exp Q, v = e / (Σe + ε) + ε, m = (u + v) / 2

               term                               slope = d term / d r
    forward    e (Q - l)                          -e / u
    reverse    u (l - Q)                          1 + l - Q
    js         (u log(u / m) + v log(v / m)) / 2  log(u / m) / 2

compare: kl = Σ term. chunk_gradient: G = (slope - Σ slope r) / (Σa + ε) / (count + ε) grad, less the tail's (its a falls as
others rise). A chunk is one program, which goes over its columns two or three times: after the first they are cached.
"""

from __future__ import annotations

import triton
import triton.language as tl

EPS = tl.constexpr(1e-10)


@triton.jit
def term_and_slope(r, Q, q_total, DIVERGENCE: tl.constexpr):
    """Of outcomes with the student's share r and the teacher's log-probability Q; 0 reads as 0 · log 0."""
    u, e = r + EPS, tl.exp(Q)
    l = tl.log(u)
    if DIVERGENCE == 0:
        return e * (tl.where(e == 0, 0.0, Q) - l), -e / u
    elif DIVERGENCE == 1:
        return u * (l - Q), 1 + l - Q
    else:
        v = e / (q_total + EPS) + EPS
        m = (u + v) / 2
        slope = tl.log(u / m) / 2
        return u * slope + v * tl.log(v / m) / 2, slope


@triton.jit
def totals(a, Q, q_tail, c, size, BLOCK: tl.constexpr):
    """Σa + ε and Σ exp Q of chunk c, both with the tail, and the tail's a."""
    b_a, b_e = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_a += tl.load(a + o, mask=o < size, other=0.0)
        b_e += tl.exp(tl.load(Q + o, mask=o < size, other=-float("inf")))
    total, q_total, a_tail = tl.sum(b_a, 0), tl.sum(b_e, 0), 0.0
    if q_tail is not None:
        a_tail = tl.maximum(1 - total, 0.0)
        total += a_tail
        q_total += tl.exp(tl.load(q_tail + c))
    return total + EPS, q_total, a_tail


@triton.jit
def compare(
    a,  # [C, k] float32
    Q,  # [C, k] float32
    q_tail,  # [C] float32, or None: no tail
    paired,  # [C] bool
    kl,  # [C] float32, out; 0 where not paired
    agree,  # [C] bool, out: r and Q have the same largest column
    size,
    DIVERGENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64)
    counted = tl.where(tl.load(paired + c) != 0, size, 0)
    a, Q = a + c * size, Q + c * size
    total, q_total, a_tail = totals(a, Q, q_tail, c, counted, BLOCK)
    b_kl = tl.zeros([BLOCK], tl.float32)
    best_r, best_q, column_r, column_q = -1.0, -float("inf"), 0, 0
    for start in range(0, counted, BLOCK):
        o = start + tl.arange(0, BLOCK)
        m = o < size
        b_r = tl.load(a + o, mask=m, other=0.0) / total
        b_q = tl.load(Q + o, mask=m, other=-float("inf"))
        b_kl += tl.where(m, term_and_slope(b_r, b_q, q_total, DIVERGENCE)[0], 0.0)
        here_r, place_r = tl.max(b_r, 0, return_indices=True)
        here_q, place_q = tl.max(b_q, 0, return_indices=True)
        column_r = tl.where(here_r > best_r, start + place_r, column_r)
        column_q = tl.where(here_q > best_q, start + place_q, column_q)
        best_r, best_q = tl.maximum(here_r, best_r), tl.maximum(here_q, best_q)
    value = tl.sum(b_kl, 0)
    if q_tail is not None:
        value += term_and_slope(a_tail / total, tl.load(q_tail + c), q_total, DIVERGENCE)[0]
    tl.store(kl + c, tl.where(counted > 0, value, 0.0))
    tl.store(agree + c, (counted > 0) & (column_r == column_q))


@triton.jit
def chunk_gradient(
    a,  # [C, k] float32
    Q,  # [C, k] float32
    q_tail,  # [C] float32, or None: no tail
    paired,  # [C] bool
    counts,  # [C] int64, student rows
    grad,  # [C] float32, dL/dkl
    G,  # [C, k] float32, out; 0 where not paired or grad is 0
    size,
    count_eps,
    DIVERGENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64)
    upstream = tl.load(grad + c)
    counted = tl.where(upstream != 0, tl.where(tl.load(paired + c) != 0, size, 0), 0)
    a, Q, G = a + c * size, Q + c * size, G + c * size
    total, q_total, a_tail = totals(a, Q, q_tail, c, counted, BLOCK)
    b_centre = tl.zeros([BLOCK], tl.float32)
    for start in range(0, counted, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_r = tl.load(a + o, mask=o < size, other=0.0) / total
        b_slope = term_and_slope(b_r, tl.load(Q + o, mask=o < size, other=0.0), q_total, DIVERGENCE)[1]
        b_centre += b_slope * b_r
    centre, slope_tail = tl.sum(b_centre, 0), 0.0
    if q_tail is not None:
        r_tail = a_tail / total
        slope = term_and_slope(r_tail, tl.load(q_tail + c), q_total, DIVERGENCE)[1]
        centre += slope * r_tail
        slope_tail = tl.where(a_tail > 0, slope - centre, 0.0)
    factor = upstream / total / (tl.load(counts + c).to(tl.float32) + count_eps)
    for start in range(0, size, BLOCK):
        o = start + tl.arange(0, BLOCK)
        m = o < counted
        b_r = tl.load(a + o, mask=m, other=0.0) / total
        b_slope = term_and_slope(b_r, tl.load(Q + o, mask=m, other=0.0), q_total, DIVERGENCE)[1]
        tl.store(G + o, tl.where(m, (b_slope - centre - slope_tail) * factor, 0.0), mask=o < size)
