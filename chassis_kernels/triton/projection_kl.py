"""KL across tokenizers through a sparse projection M; the equations stand in `reference/projection_kl.py`.

With U the student tokens that M maps into the columns J, on M chunks and deterministic throughout:

    student_statistics   per row: max, 1 / Σ exp, and the label's nll                           one read of the logits
    teacher_statistics   per row: max and Σ exp over J, or over the vocabulary and outside J
    chunk_means          pbar [M, U] of the probabilities at U; Q [M, k] of the teacher's log-probabilities at J
    weighted_sums        a [k, M] = Mᵀ pbar, an edge list by column; on the way back [U, M] = M G, by row
    gradient             dz = p / τ (back - Σ p back) + grad_nll (p₁ - [label]): a row is read twice in a row and written
                         once, the second time from its end, which is still in the cache

weighted_sums reads whole lines of chunks per edge, so nothing depends on how edges lie; a column with many edges is cut into
pieces of PIECE, summed in a second launch. Only [M, U + k] is held beside the gradient. The numbers of edges and of tokens
in U are read back from the device, once per call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from chassis_kernels import backends
from chassis_kernels.chunks import COUNT_EPS, only
from chassis_kernels.reference import projection_kl as reference
from chassis_kernels.sparse import slice_columns
from chassis_kernels.triton.shared import LOG2E, launch, online

OP = "projection_kl"
PIECE = 128


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
        p_scale = tl.where(compared, 1 / total, 0.0)
        if labels is not None:
            z_label = tl.load(logits + row * stride + tl.maximum(label, 0)).to(tl.float32)
            value = tl.where(label >= 0, tl.log(total_1) - (z_label - best), 0.0)
            p_scale_1 = tl.where(label >= 0, 1 / total_1, 0.0)
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
        tl.store(row_scale + row, 1 / total)
        if inside is not None:
            tl.store(outside_mass + row, rest / total)


@triton.jit
def chunk_means(
    logits,  # [N, V]
    ids,  # [size], which columns of the logits
    members,  # rows, chunk by chunk
    first,  # [M + 1], where each chunk's members start
    row_max,  # [N]
    row_scale,  # [N]
    means,  # [M, size] float32, out
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
    values,  # [n, M] float32
    first,  # [S], the edges of each sum
    last,  # [S]
    index,  # [E] int32, which row of the values; or None: the edge's own number
    weights,  # [E] float32; or None: 1
    sums,  # [S, M] float32, out
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


@triton.jit
def gradient(
    logits,  # [N, >= width]
    out,  # [N, head], may be the logits
    chunk,  # [N]
    slot,  # [width] int32, the place of a token in U, or -1
    back,  # [M, U] float32
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


class Inputs(NamedTuple):
    """What the ops take, in their order; see the reference."""

    student: Tensor
    teacher: Tensor
    start: Tensor
    rows: Tensor
    weights: Tensor
    columns: Tensor
    student_chunk: Tensor
    teacher_chunk: Tensor
    labels: Tensor | None
    width: int
    chunks: int
    temperature: float
    divergence: int
    tail: bool

    def contiguous(self) -> Inputs:
        """The same with rows and vectors contiguous."""
        rows = (backends.rows_contiguous(t) for t in self[:2])
        return Inputs(*rows, *(None if t is None else t.contiguous() for t in self[2:9]), *self[9:])


class Plan(NamedTuple):
    """Who meets whom: everything that depends on ids alone."""

    student_chunk: Tensor  # [N_s], -1 also for rows of a chunk without teacher rows
    teacher_chunk: Tensor  # [N_t]
    paired: Tensor  # [M] bool
    counts: Tensor  # [M] student rows
    used: Tensor  # [U] the student tokens that reach J
    slot: Tensor  # [width] int32, the place in U
    by_row: tuple[Tensor, ...]  # first, last, index, weights: from J to U
    by_column: tuple[Tensor, ...]  # the same from U to pieces of columns
    pieces: tuple[Tensor, Tensor]  # first and last piece of each column


def projection_kl(*arguments) -> tuple[Tensor, ...]:
    inputs = Inputs(*arguments).contiguous()
    plan = _plan(inputs)
    nll, row_max, row_scale, ce_scale = _statistics(plan, inputs)
    r, _, Q = _outcomes(plan, inputs, row_max, row_scale)
    return *_compare(plan, inputs, r, Q), nll, row_max, row_scale, ce_scale


def projection_kl_backward(grad: Tensor, grad_nll: Tensor | None, *arguments) -> Tensor:
    *arguments, row_max, row_scale, ce_scale = arguments
    inputs = Inputs(*arguments).contiguous()
    out = torch.empty(inputs.student.shape, dtype=inputs.student.dtype, device=inputs.student.device)
    plan, rows = _plan(inputs), (row_max.contiguous(), row_scale.contiguous(), ce_scale.contiguous())
    _gradient(plan, inputs, out, grad, grad_nll, _outcomes(plan, inputs, *rows[:2]), rows)
    return out


def projection_kl_(out: Tensor, weight: Tensor, nll_weight: Tensor | None, *arguments) -> tuple[Tensor, ...]:
    inputs = Inputs(*arguments).contiguous()
    plan = _plan(inputs)
    nll, *rows = _statistics(plan, inputs)
    outcomes = r, _, Q = _outcomes(plan, inputs, *rows[:2])
    kl, agree = _compare(plan, inputs, r, Q)
    _gradient(plan, inputs, out, weight, nll_weight, outcomes, rows)
    return kl, agree, nll


def _plan(inputs: Inputs) -> Plan:
    chunk_ids = inputs.student_chunk, inputs.teacher_chunk
    n_student, n_teacher = (reference.counts(ids, inputs.chunks) for ids in chunk_ids)
    paired = (n_student > 0) & (n_teacher > 0)
    edges = slice_columns(inputs.start, inputs.rows, inputs.weights, inputs.columns)
    used, place, count = torch.unique_consecutive(edges.rows, return_inverse=True, return_counts=True)
    slot = torch.full((inputs.width,), -1, dtype=torch.int32, device=used.device)
    slot[used] = torch.arange(len(used), dtype=torch.int32, device=used.device)
    last = count.cumsum(0)
    by_row = last - count, last, edges.positions.to(torch.int32), edges.weights
    order = torch.argsort(edges.positions, stable=True)
    first, last, pieces = _cut(inputs.start[inputs.columns + 1] - inputs.start[inputs.columns], len(order))
    by_column = first, last, place[order].to(torch.int32), edges.weights[order]
    return Plan(*(only(ids, paired) for ids in chunk_ids), paired, n_student, used, slot, by_row, by_column, pieces)


def _cut(count: Tensor, n_edges: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Pieces of at most PIECE edges of the columns that have `count` each: first and last edge of each, and by column the
    first and last piece. Their number is an upper bound, known without asking the device; those left over are empty."""
    stop, pieces = count.cumsum(0), (count + PIECE - 1) // PIECE
    stop_piece = pieces.cumsum(0)
    piece = torch.arange(len(count) + n_edges // PIECE, device=count.device)
    column = torch.searchsorted(stop_piece, piece, right=True).clamp_max(len(count) - 1)
    first = (stop - count)[column] + (piece - (stop_piece - pieces)[column]) * PIECE
    last = torch.minimum(first + PIECE, stop[column]).maximum(first)
    return first, last, (stop_piece - pieces, stop_piece)


def _sums(values: Tensor, first: Tensor, last: Tensor, index: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """Σ weights[e] values[index[e]] over the edges first..last of each sum: [S, M] from values [n, M]."""
    n_sums, n_chunks = len(first), values.shape[1]
    sums = values.new_empty(n_sums, n_chunks)
    launch(
        OP, weighted_sums,
        lambda meta: (triton.cdiv(n_sums, meta["SUMS"]), triton.cdiv(n_chunks, meta["CHUNKS"])), n_chunks,
        values=values, first=first, last=last, index=index, weights=weights, sums=sums, n_sums=n_sums, n_chunks=n_chunks,
    )  # fmt: skip
    return sums


def _means(logits, ids, chunk, chunks: int, row_max, row_scale, temperature: float, log: bool) -> Tensor:
    """Per chunk the mean of the (log-)probabilities at `ids`, [M, len(ids)]."""
    chunk, members = torch.sort(chunk, stable=True)
    first = torch.searchsorted(chunk, torch.arange(chunks + 1, device=chunk.device))
    means = row_max.new_empty(chunks, len(ids))
    launch(
        OP, chunk_means, lambda meta: (chunks, triton.cdiv(len(ids), meta["BLOCK"])), len(ids),
        logits=logits, ids=ids, members=members, first=first, row_max=row_max, row_scale=row_scale, means=means,
        stride=logits.stride(0), size=len(ids), inverse=1 / temperature, scale=LOG2E / temperature, count_eps=COUNT_EPS,
        LOG=log,
    )  # fmt: skip
    return means


def _statistics(plan: Plan, inputs: Inputs) -> tuple[Tensor, ...]:
    """nll, row_max, row_scale and ce_scale."""
    student, labels, n = inputs.student, inputs.labels, len(inputs.student)
    row_max, row_scale = (student.new_empty(n, dtype=torch.float32) for _ in range(2))
    nll, ce_scale = (student.new_empty(0 if labels is None else n, dtype=torch.float32) for _ in range(2))
    launch(
        OP, student_statistics, lambda meta: (n,), inputs.width,
        logits=student, chunk=plan.student_chunk, labels=labels, row_max=row_max, row_scale=row_scale, nll=nll,
        ce_scale=ce_scale, stride=student.stride(0), width=inputs.width, scale=LOG2E / inputs.temperature, log2e=LOG2E,
    )  # fmt: skip
    return nll, row_max, row_scale, ce_scale


def _outcomes(plan: Plan, inputs: Inputs, row_max: Tensor, row_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """r, its divisor, and Q."""
    of_student = plan.student_chunk, inputs.chunks, row_max, row_scale, inputs.temperature
    pbar = _means(inputs.student, plan.used, *of_student, log=False)
    a = _sums(_sums(pbar.t().contiguous(), *plan.by_column), *plan.pieces).t()
    return *reference.shares(a, inputs.tail), _teacher(plan, inputs)


def _teacher(plan: Plan, inputs: Inputs) -> Tensor:
    """Q, [M, k], or with the tail [M, k + 1]."""
    teacher, columns, chunks, temperature = inputs.teacher, inputs.columns, inputs.chunks, inputs.temperature
    ids, inside, size = columns, None, len(columns)
    if inputs.tail:
        ids, size = None, len(inputs.start) - 1
        inside = torch.zeros(size, dtype=torch.bool, device=teacher.device).index_fill_(0, columns, True)
    row_max, row_scale, rest = teacher.new_empty(3, len(teacher), dtype=torch.float32)
    launch(
        OP, teacher_statistics, lambda meta: (len(teacher) if size else 0,), size,
        logits=teacher, chunk=plan.teacher_chunk, columns=ids, inside=inside, row_max=row_max, row_scale=row_scale,
        outside_mass=rest, stride=teacher.stride(0), size=size, scale=LOG2E / temperature,
    )  # fmt: skip
    Q = _means(teacher, columns, plan.teacher_chunk, chunks, row_max, row_scale, temperature, log=True)
    if not inputs.tail:
        return Q
    rest, zero, one = (rest + reference.EPS).log()[:, None], torch.zeros_like(rest), torch.ones_like(rest)
    return torch.cat([Q, _means(rest, columns.new_zeros(1), plan.teacher_chunk, chunks, zero, one, 1.0, log=True)], 1)


def _compare(plan: Plan, inputs: Inputs, r: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """kl and agree, [M]."""
    k = len(inputs.columns)
    agree = plan.paired & (r[:, :k].argmax(1) == Q[:, :k].argmax(1)) if k else torch.zeros_like(plan.paired)
    return torch.where(plan.paired, reference.compare(r, Q, inputs.divergence)[0].sum(1), 0.0), agree


def _gradient(plan, inputs: Inputs, out, grad, grad_nll, outcomes, rows) -> None:
    """Write the gradient for `grad` [M] and `grad_nll` [N_s] into `out`; `rows` are row_max, row_scale and ce_scale."""
    (r, total, Q), (row_max, row_scale, ce_scale) = outcomes, rows
    G = reference.chunk_gradient(r, total, Q, inputs.divergence, inputs.tail, plan.counts, grad)
    G = torch.where(plan.paired[:, None], G, 0.0)
    back = _sums(G.t().contiguous(), *plan.by_row).t().contiguous()
    student, labels = inputs.student, None if grad_nll is None else inputs.labels
    launch(
        OP, gradient, lambda meta: (len(student),), inputs.width,
        logits=student, out=out, chunk=plan.student_chunk, slot=plan.slot, back=back, row_max=row_max, row_scale=row_scale,
        labels=labels, ce_scale=None if labels is None else ce_scale,
        grad_nll=None if labels is None else torch.where(labels >= 0, grad_nll.float(), 0.0),
        stride=student.stride(0), out_stride=out.stride(0), width=inputs.width, head=out.shape[1], n_used=len(plan.used),
        inverse=1 / inputs.temperature, scale=LOG2E / inputs.temperature, log2e=LOG2E,
    )  # fmt: skip
