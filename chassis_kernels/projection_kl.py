"""KL between a teacher and a student with different tokenizers, through a sparse projection, chunk by chunk.

The equations stand in `reference/projection_kl.py`. No [T, V] tensor is made or saved: the backward pass works from the
logits and each row's (max, 1 / sum), and may write into a buffer of the caller's, which may be the logits themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chassis_kernels import backends
from chassis_kernels.chunks import Chunks, check_chunks, layout
from chassis_kernels.reference import projection_kl as reference
from chassis_kernels.reference.precision import compute_dtype
from chassis_kernels.reference.projection_kl import ProjectionKLStats
from chassis_kernels.sparse import SparseProjection

_INPUTS = (
    "Tensor student, Tensor teacher, Tensor start, Tensor rows, Tensor weights, Tensor columns, Tensor student_chunk, "
    "Tensor teacher_chunk, int width, int chunks, float temperature, bool reverse"
)
_CPU_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def projection_kl(
    student_logits: Tensor,  # [B, T_s, >= V_s]
    teacher_logits: Tensor,  # [B, T_t, >= V_t]
    projection: SparseProjection,  # [V_s, V_t]
    chunks: Chunks,
    *,
    temperature: float = 1.0,
    vocab_topk: int = 8192,
    reverse: bool = False,
    exact_only: bool = False,
    sample_mask: Tensor | None = None,  # [B] weights
    column_mask: Tensor | None = None,  # [B, T_t] bool
    columns: Tensor | None = None,  # [k] int64
    denominator: Tensor | float | None = None,
    grad_buffer: Tensor | None = None,  # [B, T_s, >= V_s]
) -> tuple[Tensor, ProjectionKLStats]:
    """τ² Σ sample_mask KL_chunk / D in nats, [] float32 (float64 if logits are), and ProjectionKLStats.

    KL(teacher ‖ student) per chunk, or with `reverse` KL(student ‖ teacher), within the `vocab_topk` teacher columns that
    reach the largest logit anywhere in the batch (positions outside `column_mask` do not vote; ties go to the lowest id), or
    within `columns`. Logits beyond the tokenizers' sizes are left out. `exact_only` keeps chunks marked correct. D is
    `denominator`, else the number of chunks that count; at least 1. A teacher logit of -inf adds nothing forward.

    Differentiable in student_logits; logits float32, bfloat16, float16 (float64: reference backend).
    grad_buffer, of the logits' shape and dtype: the gradient is written there in the same pass as the loss, and backward
    returns it, once; a second backward raises. It may be student_logits itself, whose values are then lost. Unused
    where no gradient is asked for.

    Raises ValueError for shapes, dtypes or ids that do not fit. Method: "x-token" distillation, projection of chunk means.
    """
    check_chunks(student_logits, teacher_logits, projection.shape, chunks, sample_mask)
    _check(teacher_logits, projection, temperature, vocab_topk, column_mask, columns)
    if grad_buffer is not None and torch.is_grad_enabled() and student_logits.requires_grad:
        _check_buffer(grad_buffer, student_logits)
        plan = layout(chunks, sample_mask, exact_only, compute_dtype(student_logits, teacher_logits))
        weight = reference.chunk_weights(plan, temperature, denominator)
        with torch.no_grad():
            options = temperature, vocab_topk, reverse, column_mask, columns, _top
            arguments = reference.op_arguments(student_logits, teacher_logits, projection, plan, *options)
        loss, kl, agree = _IntoBuffer.apply(student_logits, grad_buffer, weight, *arguments[1:])
        return loss, reference.stats(plan, kl, agree, chunks, arguments[5])
    return reference.loss(
        student_logits,
        teacher_logits,
        projection,
        chunks,
        temperature=temperature,
        vocab_topk=vocab_topk,
        reverse=reverse,
        exact_only=exact_only,
        sample_mask=sample_mask,
        column_mask=column_mask,
        columns=columns,
        denominator=denominator,
        op=torch.ops.chassis.projection_kl,
        select=_top,
    )


class _IntoBuffer(torch.autograd.Function):
    """The loss and, in the same pass, its gradient in the caller's buffer; backward hands the buffer over, once."""

    @staticmethod
    def forward(ctx, student_logits, buffer, weight, *arguments):
        student, ctx.buffer = student_logits.detach().flatten(0, 1), buffer.detach()
        kl, agree = torch.ops.chassis.projection_kl_(ctx.buffer.flatten(0, 1), weight, student, *arguments)
        ctx.mark_non_differentiable(kl, agree)
        return torch.where(weight != 0, weight * kl, 0.0).sum(), kl, agree

    @staticmethod
    def backward(ctx, grad, *_):
        buffer, ctx.buffer = ctx.buffer, None
        if buffer is None:
            raise RuntimeError("projection_kl with grad_buffer allows one backward: the buffer was handed over already")
        if grad.device.type != "cpu" or grad != 1:
            buffer.mul_(grad.to(buffer.dtype) if buffer.dtype == torch.float64 else grad)
        return buffer, *(None,) * 13


def _top(teacher: Tensor, keep: Tensor | None, k: int) -> Tensor:
    return torch.ops.chassis.top_columns(teacher, keep, k)


def _check(teacher, projection, temperature, vocab_topk, column_mask, columns) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: expected a positive number")
    if vocab_topk < 1:
        raise ValueError(f"vocab_topk is {vocab_topk}: expected at least 1")
    if column_mask is not None and (column_mask.shape != teacher.shape[:2] or column_mask.dtype != torch.bool):
        raise ValueError(
            f"column_mask is {column_mask.dtype} {tuple(column_mask.shape)}, expected torch.bool {tuple(teacher.shape[:2])}"
        )
    if columns is not None and (columns.dim() != 1 or columns.dtype != torch.int64):
        raise ValueError(f"columns is {columns.dtype} {tuple(columns.shape)}, expected torch.int64 [k]")
    if columns is not None and columns.device.type == "cpu" and columns.numel():
        low, high = int(columns.min()), int(columns.max())
        if low < 0 or high >= projection.n_teacher:
            raise ValueError(f"columns hold ids from {low} to {high}, but there are {projection.n_teacher} teacher tokens")


def _check_buffer(buffer: Tensor, logits: Tensor) -> None:
    if buffer.shape != logits.shape or buffer.dtype != logits.dtype or buffer.device != logits.device:
        raise ValueError(
            f"grad_buffer is {buffer.dtype} {tuple(buffer.shape)}, expected the logits' {logits.dtype} {tuple(logits.shape)}"
        )
    if not buffer.is_contiguous():
        raise ValueError("grad_buffer must be contiguous")


def _setup_context(ctx, inputs, output):
    *tensors, ctx.width, ctx.chunks, ctx.temperature, ctx.reverse = inputs
    _, agree, row_max, row_scale = output
    ctx.mark_non_differentiable(agree, row_max, row_scale)
    ctx.save_for_backward(*tensors, row_max, row_scale)


def _backward(ctx, grad, *_):
    *tensors, row_max, row_scale = ctx.saved_tensors
    if grad is None or not ctx.needs_input_grad[0]:
        return (None,) * 12
    options = ctx.width, ctx.chunks, ctx.temperature, ctx.reverse
    return torch.ops.chassis.projection_kl_backward(grad, *tensors, *options, row_max, row_scale), *(None,) * 11


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("projection_kl has no second derivative: use xtoken_loss(..., eager=True)")


def _reference_(out, weight, *arguments):
    kl, agree, row_max, row_scale = reference.projection_kl(*arguments)
    out.copy_(reference.projection_kl_backward(weight, *arguments, row_max, row_scale))
    return kl, agree


def _cpu(student, teacher, *arguments):
    chunks, rows = arguments[-3], student.shape[0]
    out = torch.empty(chunks), torch.empty(chunks, dtype=torch.bool), torch.empty(rows), torch.empty(rows)
    _call((student, teacher, *arguments), out)
    return out


def _cpu_backward(grad, student, teacher, *arguments):
    *arguments, row_max, row_scale = arguments
    out = torch.empty(student.shape, dtype=student.dtype)
    stats = row_max.contiguous(), row_scale.contiguous()
    _call((student, teacher, *arguments), (None, None, *stats), out, grad.float().contiguous(), known=True)
    return out


def _cpu_(out, weight, student, teacher, *arguments):
    chunks, rows = arguments[-3], student.shape[0]
    kl, agree = torch.empty(chunks), torch.empty(chunks, dtype=torch.bool)
    result = kl, agree, torch.empty(rows), torch.empty(rows)
    _call((student, teacher, *arguments), result, out, weight.float().contiguous())
    return kl, agree


def _call(inputs, result, grad=None, weight=None, known=False) -> None:
    """The extension's projection_kl, on arguments made contiguous; `result` is kl, agree, row_max and row_scale."""
    student, teacher = (backends.rows_contiguous(t) for t in inputs[:2])
    tensors = [t.contiguous() for t in inputs[2:8]]
    start, rows, weights, columns, student_chunk, teacher_chunk = (t.data_ptr() for t in tensors)
    width, chunks, temperature, reverse = inputs[8:]
    backends._C.projection_kl(
        backends.matrix_args(student),
        backends.matrix_args(teacher),
        (start, rows, weights),
        (columns, len(tensors[3])),
        (student_chunk, teacher_chunk, chunks),
        width,
        temperature,
        reverse,
        tuple(0 if t is None else t.data_ptr() for t in result),
        known,
        backends.matrix_args(grad),
        0 if weight is None else weight.data_ptr(),
    )


def _cpu_top(teacher, keep, k):
    out = torch.empty(min(k, teacher.shape[1]), dtype=torch.int64)
    teacher, keep = backends.rows_contiguous(teacher), None if keep is None else keep.contiguous()
    backends._C.top_columns(
        backends.matrix_args(teacher), 0 if keep is None else keep.data_ptr(), len(out), out.data_ptr()
    )
    return out


def _fake(student, teacher, *arguments):
    dtype, chunks = compute_dtype(student, teacher), arguments[-3]
    row = student.new_empty(student.shape[0], dtype=dtype)
    return student.new_empty(chunks, dtype=dtype), student.new_empty(chunks, dtype=torch.bool), row, torch.empty_like(row)


def _fake_top(teacher, keep, k):
    return teacher.new_empty(min(k, teacher.shape[1]), dtype=torch.int64)


def _example(device: str) -> tuple:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator) for shape in ((5, 7), (4, 6)))
    ids = torch.tensor([[0, 5], [1, -1], [2, 1], [3, -1], [0, 2], [4, 3], [-1, -1]])
    view = SparseProjection(ids, torch.rand(7, 2, generator=generator), 6).columns
    columns, chunk_s, chunk_t = (torch.tensor(t) for t in ([0, 1, 3, 5], [0, 0, -1, 1, 2], [0, 1, 1, -1]))
    tensors = (t.to(device) for t in (student, teacher, *view, columns, chunk_s, chunk_t))
    return *tensors, 7, 3, 2.0, False


def _example_backward(device: str) -> tuple:
    arguments = _example(device)
    return torch.tensor([0.5, -2.0, 1.0], device=device), *arguments, *reference.projection_kl(*arguments)[2:]


def _example_into(device: str) -> tuple:
    arguments = _example(device)
    return torch.empty_like(arguments[0]), torch.tensor([0.5, -2.0, 1.0], device=device), *arguments


def _example_top(device: str) -> tuple:
    return _example(device)[1], torch.tensor([True, False, True, True], device=device), 3


backends.register(
    f"projection_kl({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.projection_kl,
    fake=_fake,
    example=_example,
    cpu=backends.Implementation(_cpu, _CPU_DTYPES, "x86-64"),
)
backends.register(
    f"projection_kl_backward(Tensor grad, {_INPUTS}, Tensor row_max, Tensor row_scale) -> Tensor",
    reference=reference.projection_kl_backward,
    fake=lambda grad, student, *arguments: torch.empty_like(student),
    example=_example_backward,
    inputs=slice(1, None),
    cpu=backends.Implementation(_cpu_backward, _CPU_DTYPES, "x86-64"),
)
backends.register(
    f"projection_kl_(Tensor(a!) out, Tensor weight, {_INPUTS}) -> (Tensor, Tensor)",
    reference=_reference_,
    fake=lambda out, weight, *arguments: _fake(*arguments)[:2],
    example=_example_into,
    cpu=backends.Implementation(_cpu_, _CPU_DTYPES, "x86-64"),
)
backends.register(
    "top_columns(Tensor teacher, Tensor? keep, int k) -> Tensor",
    reference=reference.top_columns,
    fake=_fake_top,
    example=_example_top,
    cpu=backends.Implementation(_cpu_top, _CPU_DTYPES, "x86-64"),
    triton=backends.triton_kernel("top_columns", "top_columns"),
)
torch.library.register_autograd(
    "chassis::projection_kl", _backward, setup_context=_setup_context, lib=backends.library
)
torch.library.register_autograd(
    "chassis::projection_kl_backward",
    _no_second_derivative,
    setup_context=lambda ctx, inputs, output: None,
    lib=backends.library,
)
