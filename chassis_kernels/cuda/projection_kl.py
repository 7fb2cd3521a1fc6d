"""Launches csrc/cuda/projection_kl.cu: allocates what it writes and sorts its inputs, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from chassis_kernels import backends, cuda


def projection_kl(*arguments):
    result = _outputs(*arguments)
    _call(arguments, result)
    return result


def projection_kl_backward(grad, grad_nll, student, *arguments):
    *arguments, row_max, row_scale, ce_scale = arguments
    out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    rows = row_max.contiguous(), row_scale.contiguous(), ce_scale.contiguous()
    _call((student, *arguments), (None, None, None, *rows), out, (grad, grad_nll), known=True)
    return out


def projection_kl_(out, weight, nll_weight, *arguments):
    result = _outputs(*arguments)
    _call(arguments, result, out, (weight, nll_weight))
    return result[:3]


def _outputs(student, teacher, *arguments) -> tuple[Tensor, ...]:
    """Room for kl, agree, nll, row_max, row_scale and ce_scale."""
    labels, chunks, rows = arguments[6], arguments[8], student.shape[0]
    labelled = 0 if labels is None else rows
    sizes = (chunks, torch.float32), (chunks, torch.bool), *((n, torch.float32) for n in (labelled, rows, rows, labelled))
    return tuple(student.new_empty(size, dtype=dtype) for size, dtype in sizes)


def _call(inputs, result, grad=None, upstream=(None, None), known=False) -> None:
    """The extension's projection_kl, on arguments made contiguous; `result` as `_outputs` has it."""
    student, teacher = (backends.rows_contiguous(t) for t in inputs[:2])
    start, rows, weights, columns, *ids, labels = (None if t is None else t.contiguous() for t in inputs[2:9])
    upstream = [None if t is None else t.float().contiguous() for t in upstream]
    width, chunks, temperature, divergence, tail = inputs[9:]
    with cuda.stream_of(student.device) as stream:
        pieces = _slice(start, rows, weights, columns, width, tail, stream)
        members = [_members(t, chunks) for t in ids]
        dtype, touched = backends.DTYPE_CODES[student.dtype], min(width, len(rows))
        launch = backends._CUDA.projection_kl_launch(dtype, len(columns) + tail, touched)
        work = student.new_empty(launch[0] * launch[2], dtype=torch.float32), student.new_zeros(1, dtype=torch.int32)
        backends._CUDA.projection_kl(
            backends.matrix_args(student),
            backends.matrix_args(teacher),
            _addresses(pieces),
            (*map(_addresses, members), _address(labels), chunks, len(start) - 1),
            (temperature, divergence, tail),
            _addresses(result),
            known,
            backends.matrix_args(grad),
            _addresses(upstream),
            launch,
            _addresses(work),
            stream,
        )


def _members(ids: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """The rows of each chunk: order[first[c]:first[c + 1]], ascending; the rows of none come before first[0]."""
    ordered, order = torch.sort(ids, stable=True)
    return torch.searchsorted(ordered, torch.arange(chunks + 1, device=ids.device)), order


def _slice(start: Tensor, rows: Tensor, weights: Tensor, columns: Tensor, width: int, tail: bool, stream: int) -> tuple:
    """The fields of `Slice` in csrc/cuda/ops.h: the projection's entries in `columns`, by teacher and by student token."""
    columns, place = torch.sort(columns, stable=True)
    place, touched = place.to(torch.int32), min(width, len(rows))
    count, ends, rank = (place.new_zeros(width) for _ in range(3))
    chosen = place.new_zeros((len(start) + 30) // 32) if tail else None
    words, entries = place.new_empty(width // 32 + 2, 2), place.new_empty(len(rows), 2)
    ids, begin, slot = (place.new_empty(size) for size in (touched, touched + 1, len(rows)))
    pieces = start, rows, weights, columns, place, len(columns), width
    pieces += count, ends, rank, words, ids, begin, slot, entries, chosen
    backends._CUDA.count_rows(_addresses(pieces), stream)
    torch.cumsum(count, 0, dtype=torch.int32, out=ends)
    torch.cumsum(count > 0, 0, dtype=torch.int32, out=rank)
    backends._CUDA.slice_rows(_addresses(pieces), stream)
    return pieces


def _address(value):
    return 0 if value is None else value.data_ptr() if isinstance(value, Tensor) else value


def _addresses(values) -> tuple:
    return tuple(map(_address, values))
