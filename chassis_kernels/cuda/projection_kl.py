"""Launches csrc/cuda/projection_kl.cu: allocates what it writes and sorts its inputs, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from chassis_kernels import cuda
from chassis_kernels.backends import DTYPE_CODES, matrix_args, rows_contiguous

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def forward(student, teacher, *arguments):
    labels, chunks, rows = arguments[6], arguments[8], len(student)
    result = _results(student, labels, chunks)
    _call((student, teacher, *arguments), result)
    return result


def backward(grad, grad_nll, student, teacher, *arguments):
    *arguments, row_max, row_scale, ce_scale = arguments
    out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    stats = (t.contiguous() for t in (row_max, row_scale, ce_scale))
    grad, grad_nll = (None if t is None else t.float().contiguous() for t in (grad, grad_nll))
    _call((student, teacher, *arguments), (None, None, None, *stats), out, grad, grad_nll, known=True)
    return out


def forward_and_backward(out, weight, nll_weight, student, teacher, *arguments):
    result = _results(student, arguments[6], arguments[8])
    weight, nll_weight = (None if t is None else t.float().contiguous() for t in (weight, nll_weight))
    _call((student, teacher, *arguments), result, out, weight, nll_weight)
    return result[:3]


def _results(student: Tensor, labels: Tensor | None, chunks: int) -> tuple[Tensor, ...]:
    """kl, agree, nll, row_max, row_scale, ce_scale, to be written."""
    rows, labelled = len(student), 0 if labels is None else len(student)
    sizes = (chunks, torch.float32), (chunks, torch.bool), *((n, torch.float32) for n in (labelled, rows, rows, labelled))
    return tuple(torch.empty(n, dtype=dtype, device=student.device) for n, dtype in sizes)


def _call(inputs, result, grad=None, weight=None, nll_weight=None, known=False) -> None:
    student, teacher = (rows_contiguous(t) for t in inputs[:2])
    start, rows, weights, columns, student_chunk, teacher_chunk = (t.contiguous() for t in inputs[2:8])
    labels, width, chunks, *options = inputs[8:]
    labels = None if labels is None else labels.contiguous()
    with cuda.stream_of(student.device) as stream:
        members = [_members(ids, chunks) for ids in (student_chunk, teacher_chunk)]
        pieces = _slice(start, rows, weights, columns, width, stream)
        plan = cuda._CUDA.projection_kl_launch(DTYPE_CODES[student.dtype], len(columns), min(width, len(rows)))
        work = student.new_empty(plan[0] * plan[2], dtype=torch.float32), student.new_zeros(1, dtype=torch.int32)
        cuda._CUDA.projection_kl(
            matrix_args(student),
            matrix_args(teacher),
            _addresses(pieces),
            (*map(_addresses, members), _address(labels), chunks),
            tuple(options),
            _addresses(result),
            known,
            matrix_args(grad),
            _addresses((weight, nll_weight)),
            plan,
            _addresses(work),
            stream,
        )


def _members(ids: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """The rows of each chunk: order[first[c]:first[c + 1]], ascending; the rows of none come before first[0]."""
    ordered, order = torch.sort(ids, stable=True)
    return torch.searchsorted(ordered, torch.arange(chunks + 1, device=ids.device)), order


def _slice(start: Tensor, rows: Tensor, weights: Tensor, columns: Tensor, width: int, stream: int) -> tuple:
    """The fields of `Slice` in csrc/cuda/ops.h: the projection's entries in `columns`, by teacher and by student token."""
    columns, place = torch.sort(columns, stable=True)
    count, ends, rank = (torch.zeros(width, dtype=torch.int32, device=rows.device) for _ in range(3))
    words = count.new_empty(width // 32 + 2, 2)
    ids, begin, slot = (count.new_empty(n) for n in (min(width, len(rows)), min(width, len(rows)) + 1, len(rows)))
    place = place.to(torch.int32)
    given = start, rows, weights, columns, place, len(columns), width
    pieces = *given, count, ends, rank, words, ids, begin, slot, count.new_empty(len(rows), 2)
    cuda._CUDA.count_rows(_addresses(pieces), stream)
    torch.cumsum(count, 0, dtype=torch.int32, out=ends)
    torch.cumsum(count > 0, 0, dtype=torch.int32, out=rank)
    cuda._CUDA.slice_rows(_addresses(pieces), stream)
    return pieces


def _address(value):
    return 0 if value is None else value.data_ptr() if isinstance(value, Tensor) else value


def _addresses(values) -> tuple:
    return tuple(map(_address, values))
