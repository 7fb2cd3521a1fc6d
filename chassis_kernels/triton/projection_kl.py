"""KL across tokenizers through a sparse projection M; the equations stand in `reference/projection_kl.py`.

With U the student tokens that M maps into the columns J, over C chunks and deterministic throughout:

    student_statistics   each row's max and 1 / Σ exp, and its label's nll                 logit_rows.py
    chunk_means          pbar [C, U], and Q [C, k] of the teacher's log-probabilities      chunk_sums.py
    weighted_sums        a [k, C] = Mᵀ pbarᵀ, by an edge list of columns                   chunk_sums.py
    compare              kl and agree [C]; chunk_gradient: G [C, k]                        divergence.py
    weighted_sums        back [U, C] = M Gᵀ, by an edge list of rows
    gradient             one pass over the student's logits                                logit_rows.py

A column of many edges is cut into pieces of PIECE, summed by a second launch. Beside the gradient only some [C, U + k] are
held. The number of edges and the size of U come back from the device, once per call each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from chassis_kernels import backends
from chassis_kernels.chunks import COUNT_EPS, only
from chassis_kernels.reference import projection_kl as reference
from chassis_kernels.sparse import slice_columns
from chassis_kernels.triton.chunk_sums import chunk_means, weighted_sums
from chassis_kernels.triton.divergence import chunk_gradient, compare
from chassis_kernels.triton.logit_rows import gradient, student_statistics, teacher_statistics
from chassis_kernels.triton.shared import LOG2E, launch

OP = "projection_kl"
PIECE = 128


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
    paired: Tensor  # [C] bool
    counts: Tensor  # [C] student rows
    used: Tensor  # [U] the student tokens that reach J
    slot: Tensor  # [width] int32, the place in U
    by_row: tuple[Tensor, ...]  # first, last, index, weights: from J to U
    by_column: tuple[Tensor, ...]  # the same from U to pieces of columns
    pieces: tuple[Tensor, Tensor]  # first and last piece of each column


def projection_kl(*arguments) -> tuple[Tensor, ...]:
    inputs = Inputs(*arguments).contiguous()
    plan = _plan(inputs)
    nll, *rows = _statistics(plan, inputs)
    return *_compare(plan, inputs, _sides(plan, inputs, *rows[:2])), nll, *rows


def projection_kl_backward(grad: Tensor, grad_nll: Tensor | None, *arguments) -> Tensor:
    *arguments, row_max, row_scale, ce_scale = arguments
    inputs = Inputs(*arguments).contiguous()
    out = torch.empty(inputs.student.shape, dtype=inputs.student.dtype, device=inputs.student.device)
    plan, rows = _plan(inputs), (row_max.contiguous(), row_scale.contiguous(), ce_scale.contiguous())
    _gradient(plan, inputs, out, grad, grad_nll, _sides(plan, inputs, *rows[:2]), rows)
    return out


def projection_kl_(out: Tensor, weight: Tensor, nll_weight: Tensor | None, *arguments) -> tuple[Tensor, ...]:
    inputs = Inputs(*arguments).contiguous()
    plan = _plan(inputs)
    nll, *rows = _statistics(plan, inputs)
    sides = _sides(plan, inputs, *rows[:2])
    kl, agree = _compare(plan, inputs, sides)
    _gradient(plan, inputs, out, weight, nll_weight, sides, rows)
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
    """Σ weights[e] values[index[e]] over the edges first..last of each sum: [S, C] from values [n, C]."""
    n_sums, n_chunks = len(first), values.shape[1]
    sums = values.new_empty(n_sums, n_chunks)
    launch(
        OP, weighted_sums,
        lambda meta: (triton.cdiv(n_sums, meta["SUMS"]), triton.cdiv(n_chunks, meta["CHUNKS"])), n_chunks,
        values=values, first=first, last=last, index=index, weights=weights, sums=sums, n_sums=n_sums, n_chunks=n_chunks,
    )  # fmt: skip
    return sums


def _means(logits, ids, chunk, chunks: int, row_max, row_scale, temperature: float, log: bool) -> Tensor:
    """Per chunk the mean of the (log-)probabilities at `ids`, [C, len(ids)]."""
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


def _sides(plan: Plan, inputs: Inputs, row_max: Tensor, row_scale: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """a and Q, [C, k], and with the tail Q's last outcome, [C]."""
    return _student(plan, inputs, row_max, row_scale), *_teacher(plan, inputs)


def _student(plan: Plan, inputs: Inputs, row_max: Tensor, row_scale: Tensor) -> Tensor:
    """a, [C, k]."""
    of_student = plan.student_chunk, inputs.chunks, row_max, row_scale, inputs.temperature
    pbar = _means(inputs.student, plan.used, *of_student, log=False).t().contiguous()
    return _sums(_sums(pbar, *plan.by_column), *plan.pieces).t().contiguous()


def _teacher(plan: Plan, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """Q, and the tail's."""
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
        return Q, None
    rest, zero, one = (rest + reference.EPS).log()[:, None], torch.zeros_like(rest), torch.ones_like(rest)
    return Q, _means(rest, columns.new_zeros(1), plan.teacher_chunk, chunks, zero, one, 1.0, log=True)[:, 0]


def _compare(plan: Plan, inputs: Inputs, sides: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """kl and agree, [C]."""
    a, Q, q_tail = sides
    kl, agree = a.new_empty(inputs.chunks), torch.empty_like(plan.paired)
    launch(
        OP, compare, lambda meta: (inputs.chunks,), a.shape[1],
        a=a, Q=Q, q_tail=q_tail, paired=plan.paired, kl=kl, agree=agree, size=a.shape[1], DIVERGENCE=inputs.divergence,
    )  # fmt: skip
    return kl, agree


def _gradient(plan, inputs: Inputs, out, grad, grad_nll, sides, rows) -> None:
    """Write the gradient for `grad` [C] and `grad_nll` [N_s] into `out`; `rows` are row_max, row_scale and ce_scale."""
    (a, Q, q_tail), (row_max, row_scale, ce_scale) = sides, rows
    G = torch.empty_like(a)
    launch(
        OP, chunk_gradient, lambda meta: (inputs.chunks,), a.shape[1],
        a=a, Q=Q, q_tail=q_tail, paired=plan.paired, counts=plan.counts, grad=grad.float().contiguous(), G=G,
        size=a.shape[1], count_eps=COUNT_EPS, DIVERGENCE=inputs.divergence,
    )  # fmt: skip
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
