"""An expert's probabilities as probabilities of base tokens, through a sparse table M: two reads of the logits.

    row_sums: per state  top = max z,  scale = w / Σ exp((z - top) / τ),  mass and u of the reference
    gather:   q[n, b] = Σ over the entries (t, M[t, b]) of column b  (exp((z[n, t] - top) / τ) scale + listed[n, t]) M[t, b]
    mask_rows, where tokens are blocked:  q = 0 for them, then log(q mass / Σ q)

Either ends with the floor, where one is given: log((1 - Σ floor) q + floor).

Listed probabilities, and those of further states of a row, are first laid out by table row, PART rows of the batch at a
time.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from chassis_kernels import backends
from chassis_kernels.triton.shared import LOG2E, MINUS_INFINITY, launch

PART = 256
LOWEST = tl.constexpr(-3.4028234663852886e38)
SMALLEST = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def log_or_nothing(x):
    """log(x), and -inf below the smallest normal number; a NaN stays one."""
    nothing = x < SMALLEST
    return tl.where(nothing, MINUS_INFINITY, tl.log(tl.where(nothing, 1.0, x)))


@triton.jit
def row_sums(
    logits,  # [any, >= width]
    index,  # [S] which of them, or None: all
    row_sum,  # [>= width]
    spread,
    log_weight,  # [S], or None
    top,  # [S] and below: written
    scale,
    mass,
    uncertainty,
    width,
    stride,
    log2e_over_temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z = logits + (row if index is None else tl.load(index + row)) * stride
    b_top = tl.full([BLOCK], LOWEST, tl.float32)
    b_total = tl.zeros([BLOCK], tl.float32)
    b_mass = tl.zeros([BLOCK], tl.float32)
    b_spread = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        o_t = first + tl.arange(0, BLOCK)
        m_t = o_t < width
        b_z = tl.load(z + o_t, mask=m_t, other=MINUS_INFINITY).to(tl.float32)
        b_new = tl.maximum(b_top, b_z)
        b_old = tl.exp2((b_top - b_new) * log2e_over_temperature)
        b_e = tl.exp2((b_z - b_new) * log2e_over_temperature)
        b_total = b_total * b_old + b_e
        b_mass = b_mass * b_old + b_e * tl.load(row_sum + o_t, mask=m_t, other=0.0)
        b_spread = b_spread * b_old + b_e * tl.load(spread + o_t, mask=m_t, other=0.0)
        b_top = b_new
    best = tl.max(b_top, 0)
    b_old = tl.exp2((b_top - best) * log2e_over_temperature)
    total = tl.sum(b_total * b_old, 0)
    weight = 1.0
    if log_weight is not None:
        weight = tl.exp(tl.load(log_weight + row).to(tl.float32))
    factor = tl.where(total == 0, 0.0, weight / tl.where(total == 0, 1.0, total))
    tl.store(top + row, best)
    tl.store(scale + row, factor)
    tl.store(mass + row, tl.sum(b_mass * b_old, 0) * factor)
    tl.store(uncertainty + row, tl.sum(b_spread * b_old, 0) * factor)


@triton.jit
def gather(
    logits,  # [any, >= width]
    index,  # [N] which of them, -1 for none; or None: all
    listed,  # [N, n_rows] float32, or None
    top,  # [N]
    scale,
    factor,
    floor,  # [n_base], or None
    above,  # 1 - Σ floor
    start,  # [n_base + 1]
    rows,  # [entries] int32
    weights,
    log_q,  # [N, n_base]
    n,
    n_rows,
    n_base,
    width,
    stride,
    log2e_over_temperature,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOGARITHM: tl.constexpr,
):
    o_b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_n = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_b, m_n = o_b < n_base, o_n < n
    b_first = tl.load(start + o_b, mask=m_b, other=0)
    b_count = tl.load(start + o_b + 1, mask=m_b, other=0) - b_first
    b_top = tl.load(top + o_n, mask=m_n, other=0.0)[:, None]
    b_scale = tl.load(scale + o_n, mask=m_n, other=0.0)[:, None]
    b_row = o_n if index is None else tl.load(index + o_n, mask=m_n, other=-1)
    m_z = m_n & (b_row >= 0)
    b_q = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in range(0, tl.max(b_count, 0)):
        m_i = i < b_count
        b_t = tl.load(rows + b_first + i, mask=m_i, other=0).to(tl.int64)
        b_w = tl.load(weights + b_first + i, mask=m_i, other=0.0)
        m_there = m_z[:, None] & (m_i & (b_t < width))[None, :]
        b_z = tl.load(logits + b_row[:, None] * stride + b_t[None, :], mask=m_there, other=MINUS_INFINITY).to(tl.float32)
        b_p = tl.exp2((b_z - b_top) * log2e_over_temperature) * b_scale
        if listed is not None:
            b_p += tl.load(listed + o_n[:, None] * n_rows + b_t[None, :], mask=m_n[:, None] & m_i[None, :], other=0.0)
        b_q += b_p * b_w[None, :]
    if LOGARITHM:
        b_q *= tl.load(factor + o_n, mask=m_n, other=0.0)[:, None]
        if floor is not None:
            b_q = b_q * above + tl.load(floor + o_b, mask=m_b, other=0.0)[None, :]
        b_q = log_or_nothing(b_q)
    tl.store(log_q + o_n[:, None] * n_base + o_b[None, :], b_q, mask=m_n[:, None] & m_b[None, :])


@triton.jit
def mask_rows(
    log_q,  # [N, n_base], q before and log q after
    blocked_start,
    blocked,
    previous,  # [N]
    mass,  # [N], 0 afterwards where nothing is left
    factor,  # [N], for the rows without a list
    floor,  # [n_base], or None
    above,
    n_base,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    q = log_q + row * n_base
    which = tl.load(previous + row)
    b_factor = tl.load(factor + row)
    if which >= 0:
        last = tl.load(blocked_start + which + 1)
        for first in range(tl.load(blocked_start + which), last, BLOCK):
            o_i = first + tl.arange(0, BLOCK)
            tl.store(q + tl.load(blocked + o_i, mask=o_i < last, other=0), 0.0, mask=o_i < last)
        tl.debug_barrier()  # the zeros were stored by other threads of this program
        b_sum = tl.zeros([BLOCK], tl.float32)
        for first in range(0, n_base, BLOCK):
            o_b = first + tl.arange(0, BLOCK)
            b_sum += tl.load(q + o_b, mask=o_b < n_base, other=0.0)
        rest = tl.sum(b_sum, 0)
        mapped = tl.load(mass + row)
        share = 1.0 if NORMALIZE else mapped
        nothing = rest <= SMALLEST
        b_factor = tl.where(nothing, 0.0, share / tl.where(nothing, 1.0, rest))
        tl.store(mass + row, tl.where(nothing, 0.0, mapped))
    for first in range(0, n_base, BLOCK):
        o_b = first + tl.arange(0, BLOCK)
        b_q = tl.load(q + o_b, mask=o_b < n_base, other=0.0) * b_factor
        if floor is not None:
            b_q = b_q * above + tl.load(floor + o_b, mask=o_b < n_base, other=0.0)
        tl.store(q + o_b, log_or_nothing(b_q), mask=o_b < n_base)


def bridge_project(
    logits, index, index_start, log_weight, log_probs, ids, listed_start, start, rows, weights, row_sum, spread,
    blocked_start, blocked, previous, floor, width, temperature, normalize,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    logits, n_base, n_rows = backends.rows_contiguous(logits), len(start) - 1, len(row_sum)
    n_states = len(logits) if index is None else len(index)
    n = n_states if index_start is None else len(index_start) - 1
    above = 1.0 if floor is None else 1 - float(floor.double().sum())
    floor = {"floor": None if floor is None else floor.float(), "above": above}
    log_q = logits.new_empty(n, n_base, dtype=torch.float32)
    top, scale, mass, uncertainty = log_q.new_empty(4, n_states)
    table = {"start": start, "rows": rows, "weights": weights}
    shape = {"width": width, "stride": logits.stride(0), "log2e_over_temperature": LOG2E / temperature}
    launch(
        "bridge_project", row_sums, lambda meta: (n_states,), width,
        logits=logits, index=index, row_sum=row_sum, spread=spread, log_weight=log_weight, top=top, scale=scale, mass=mass,
        uncertainty=uncertainty, **shape,
    )  # fmt: skip
    share = (scale != 0).float() if log_weight is None else torch.where(scale != 0, log_weight.float().exp(), 0.0)
    parts = []  # (the row of each entry, what lays out a stretch of the entries)
    if index_start is not None:
        of = torch.repeat_interleave(index_start.diff())
        mass, uncertainty, share = (x.new_zeros(n).index_add_(0, of, x) for x in (mass, uncertainty, share))
        later = (torch.arange(n_states, device=of.device) > index_start[of]).nonzero()[:, 0]
        where, unit, best = (x[later] for x in (index, scale, top))

        def mix(by_row, rows, own):
            z = logits[where[own], :width].float()
            by_row[:, :width].index_add_(0, rows, ((z - best[own, None]) / temperature).exp() * unit[own, None])

        parts.append((of[later], mix))
        first = torch.where(index_start.diff() > 0, index_start[:-1], n_states)
        index, top, scale = (torch.cat([x, x.new_tensor([none])])[first] for x, none in ((index, -1), (top, 0), (scale, 0)))
    if ids is not None and n_rows:
        of, places = torch.repeat_interleave(listed_start.diff()), ids.clamp_min(0)
        p = torch.where(ids >= 0, log_probs.float().exp(), 0.0)
        share = share.index_add(0, of, p)
        mass.index_add_(0, of, p * row_sum[places])
        uncertainty.index_add_(0, of, p * spread[places])
        parts.append((of, lambda by_row, rows, own: by_row.index_put_((rows, places[own]), p[own], accumulate=True)))
    uncertainty += (1 - share).clamp_min(0)
    factor = torch.where(mass > 0, 1 / mass, 1.0) if normalize else torch.ones_like(mass)
    bounds = [*range(0, n, PART if parts else max(n, 1)), n]
    cuts = [torch.searchsorted(of, torch.tensor(bounds, device=of.device)).tolist() for of, _ in parts]
    for i, (begin, end) in enumerate(pairwise(bounds)):
        by_row = log_q.new_zeros(end - begin, n_rows) if parts else None
        for (of, lay_out), cut in zip(parts, cuts, strict=True):
            own = slice(cut[i], cut[i + 1])
            lay_out(by_row, of[own] - begin, own)
        part = slice(begin, end)
        launch(
            "bridge_project", gather,
            lambda meta, m=end - begin: (triton.cdiv(n_base, meta["BLOCK"]), triton.cdiv(m, meta["ROWS"])), n_base,
            logits=logits if index is not None else logits[part], index=None if index is None else index[part],
            listed=by_row, top=top[part], scale=scale[part], factor=factor[part], **table, **floor,
            log_q=log_q[part], n=end - begin, n_rows=n_rows, n_base=n_base, **shape, LOGARITHM=previous is None,
        )  # fmt: skip
    if previous is not None:
        launch(
            "bridge_project", mask_rows, lambda meta: (n,), n_base,
            log_q=log_q, blocked_start=blocked_start, blocked=blocked, previous=previous, mass=mass, factor=factor,
            **floor, n_base=n_base, NORMALIZE=normalize,
        )  # fmt: skip
    return log_q, mass, uncertainty
