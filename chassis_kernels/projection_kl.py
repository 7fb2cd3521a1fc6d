"""KL between a teacher and a student with different tokenizers, through a sparse projection, chunk by chunk.

The equations stand in `reference/projection_kl.py`. The only [T, V] tensor is the gradient, made in the same pass as the
loss; with labels, whose gradient is not known before, in the backward pass, from the logits and each row's (max, 1 / sum).
It may go to a buffer of the caller's, which may be the logits themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chassis_kernels import backends, pages
from chassis_kernels.chunks import Chunks, check_chunks, check_temperature, layout
from chassis_kernels.grad_buffer import at_once, hand_over, one_pass
from chassis_kernels.parallel import projection_kl as sharded
from chassis_kernels.parallel.groups import ONE_RANK, Parallel
from chassis_kernels.parallel.next_token import next_token_nll
from chassis_kernels.reference import projection_kl as reference
from chassis_kernels.reference.precision import compute_dtype
from chassis_kernels.reference.projection_kl import DIVERGENCES, ProjectionKLStats
from chassis_kernels.sparse import ProjectionView, SparseProjection
from chassis_kernels.teacher import Teacher, logits_shaped, operands

_INPUTS = (
    "Tensor student, Tensor teacher, Tensor start, Tensor rows, Tensor weights, Tensor columns, Tensor student_chunk, "
    "Tensor teacher_chunk, Tensor? labels, SymInt width, SymInt chunks, float temperature, int divergence, bool tail"
)
_CPU_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def projection_kl(
    student_logits: Tensor,  # [B, T_s, >= V_s]
    teacher_logits: Teacher,  # [B, T_t, >= V_t], or a TeacherHead or TopK of as many positions
    projection: SparseProjection,  # [V_s, V_t]
    chunks: Chunks,
    *,
    temperature: float = 1.0,
    vocab_topk: int = 8192,
    divergence: str = "forward",
    tail: bool = False,
    exact_only: bool = False,
    sample_mask: Tensor | None = None,  # [B] weights
    column_mask: Tensor | None = None,  # [B, T_t] bool
    columns: Tensor | None = None,  # [k] int64
    denominator: Tensor | float | None = None,
    labels: Tensor | None = None,  # [B, T_s] int64, -1: none
    label_weight: Tensor | None = None,  # [B, T_s]
    grad_buffer: Tensor | None = None,  # [B, T_s, >= V_s]
    parallel: Parallel = ONE_RANK,
) -> tuple[Tensor, ProjectionKLStats]:
    """τ² Σ sample_mask KL_chunk / D in nats, [] float32 (float64 if logits are), and ProjectionKLStats.

    Per chunk KL(teacher ‖ student) ("forward"), KL(student ‖ teacher) ("reverse") or Jensen-Shannon ("js", at most log 2)
    within the `vocab_topk` teacher columns that reach the largest logit anywhere in the batch (positions outside
    `column_mask` do not vote; ties go to the lowest id), or within `columns`; with `tail` the mass outside them is one more
    outcome on both sides. Logits beyond the tokenizers' sizes are left out. `exact_only` keeps chunks marked correct. D is
    `denominator`, else the number of chunks that count; at least 1. A teacher logit of -inf adds nothing but to "reverse".

    labels: the token that each position predicts. stats.nll is then its -log p at temperature 1, from the same read of the
    logits, and Σ label_weight · nll, where given, is added to the loss.

    Differentiable in student_logits; logits float32, bfloat16, float16 (float64: reference backend). Without labels the
    gradient of float32 and bfloat16 logits is made in the same pass as the loss and held until backward.
    grad_buffer, of the logits' shape and dtype: the gradient is written there in the same pass as the loss, and backward
    returns it, once; a second backward raises. It may be student_logits itself, whose values are then lost. Unused
    where no gradient is asked for. The loss alone has a gradient then: labels need a label_weight.
    parallel: the groups over which vocabulary and sequence are spread (`Parallel`); logits are then this rank's. All ranks
    give a grad_buffer, or none; the gradient, made apart, is copied there.

    Raises ValueError for shapes, dtypes or ids that do not fit. Method: "x-token" distillation, projection of chunk means.
    """
    shaped = logits_shaped(teacher_logits, projection.n_teacher)
    check_chunks(student_logits, shaped, projection.shape, chunks, sample_mask, parallel)
    _check(shaped, projection, temperature, vocab_topk, divergence, column_mask, columns)
    _check_labels(student_logits, projection.n_student, labels, label_weight)
    options = {
        "temperature": temperature,
        "vocab_topk": vocab_topk,
        "divergence": divergence,
        "tail": tail,
        "exact_only": exact_only,
        "sample_mask": sample_mask,
        "column_mask": column_mask,
        "columns": columns,
        "denominator": denominator,
        "labels": labels,
        "label_weight": label_weight,
    }
    if not isinstance(teacher_logits, Tensor):
        chosen = {name: options[name] for name in ("temperature", "tail", "column_mask", "columns")}
        found = operands(teacher_logits, projection.columns, vocab_topk, **chosen, parallel=parallel)
        compact = found.logits.unflatten(0, shaped.shape[:2]), ProjectionView(found.view, projection.n_student)
        options |= {"columns": found.places, "column_mask": None, "grad_buffer": grad_buffer, "parallel": parallel}
        loss, stats = projection_kl(student_logits, *compact, chunks, **options)
        return loss, stats._replace(columns=found.columns)
    if parallel.sharded:

        def run(logits):
            loss, found = sharded.loss(logits, teacher_logits, projection, chunks, parallel, **options)
            if grad_buffer is None or labels is None or not loss.requires_grad:
                return loss, found
            _check_label_weight(label_weight)
            return loss, found._replace(nll=found.nll.detach())

        return at_once(run, student_logits, grad_buffer, "projection_kl")
    if labels is None or grad_buffer is not None:
        gradient = one_pass(student_logits, grad_buffer, sample_mask, denominator)
        if gradient is not None:
            inputs = student_logits, teacher_logits, projection, chunks
            return _with_gradient(gradient, *inputs, repeatable=grad_buffer is None, **options)
    ops = {"op": torch.ops.chassis.projection_kl, "select": _top}
    return reference.loss(student_logits, teacher_logits, projection, chunks, **options, **ops)


def cross_entropy(logits: Tensor, labels: Tensor, size: int, *, parallel: Parallel = ONE_RANK) -> tuple[Tensor, Tensor]:
    """-log softmax(logits[..., :size]) of labels [B, T] (-1: none), in nats, [B, T] and 0 where there is none; and where no
    logit is above the label's, [B, T] bool. logits [B, T, >= size], read once; differentiable in them."""
    _check_labels(logits, size, labels, None)
    if parallel.sharded:
        logits, spread = parallel.cut(logits, size)
        return next_token_nll(logits, labels, spread)
    return reference.cross_entropy(logits, labels, size, torch.ops.chassis.projection_kl)


def _with_gradient(gradient, student_logits, teacher_logits, projection, chunks, *, repeatable, columns, labels, **options):
    """The loss and, in the same pass, its gradient."""
    label_weight, temperature = options["label_weight"], options["temperature"]
    if labels is not None:
        _check_label_weight(label_weight)
    plan = layout(chunks, options["sample_mask"], options["exact_only"], compute_dtype(student_logits, teacher_logits))
    weight = reference.chunk_weights(plan, temperature, options["denominator"])
    op = torch.ops.chassis.projection_kl_
    with torch.no_grad():
        if columns is None:
            chosen = options["column_mask"], options["vocab_topk"]
            columns = reference.choose_columns(teacher_logits, projection, *chosen, _top)
        scalars = float(temperature), DIVERGENCES.index(options["divergence"]), options["tail"]
        arguments = reference.op_arguments(student_logits, teacher_logits, projection, plan, columns, labels, scalars)
        label_weight = None if label_weight is None else label_weight.flatten().to(weight.dtype)
        kl, agree, nll = op(gradient.flatten(0, 1), weight, label_weight, *arguments)
        loss = reference.weighted_sum(kl, weight)
        if label_weight is not None:
            loss = loss + reference.weighted_sum(nll, label_weight)
    stats = reference.stats(plan, kl, agree, chunks, columns)
    stats = stats if labels is None else stats._replace(nll=nll.view(labels.shape))
    again = (op, weight, label_weight, *arguments) if repeatable else (None,)
    return hand_over(loss, student_logits, gradient, "projection_kl", *again), stats


def _top(teacher: Tensor, keep: Tensor | None, k: int) -> Tensor:
    return torch.ops.chassis.top_columns(teacher, keep, k)


def _check(teacher, projection, temperature, vocab_topk, divergence, column_mask, columns) -> None:
    check_temperature(temperature)
    if vocab_topk < 1:
        raise ValueError(f"vocab_topk is {vocab_topk}: expected at least 1")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}: expected one of {', '.join(DIVERGENCES)}")
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


def _check_label_weight(weight: Tensor | None) -> None:
    if weight is None:
        raise ValueError("labels with grad_buffer need a label_weight: the buffer holds the gradient of the loss alone")


def _check_labels(logits: Tensor, size: int, labels: Tensor | None, weight: Tensor | None) -> None:
    shape = tuple(logits.shape[:2])
    if labels is not None and (labels.shape != shape or labels.dtype != torch.int64):
        raise ValueError(f"labels is {labels.dtype} {tuple(labels.shape)}, expected torch.int64 {shape}")
    if labels is not None and labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
        low, high = int(labels.min()), int(labels.max())
        if low < -1 or high >= size:
            raise ValueError(f"labels hold ids from {low} to {high}, expected -1..{size - 1}, -1 for none")
    if weight is not None and (labels is None or weight.shape != shape):
        given = "no labels" if labels is None else f"shape {tuple(weight.shape)}"
        raise ValueError(f"label_weight comes with {given}, expected labels and shape {shape}")


def _setup_context(ctx, inputs, output):
    *tensors, ctx.width, ctx.chunks, ctx.temperature, ctx.divergence, ctx.tail = inputs
    _, agree, _, *rows = output
    ctx.mark_non_differentiable(agree, *rows)
    ctx.save_for_backward(*tensors, *rows)


def _backward(ctx, grad, agree, grad_nll, *_):
    *tensors, row_max, row_scale, ce_scale = ctx.saved_tensors
    if not ctx.needs_input_grad[0]:
        return (None,) * 14
    if grad is None:
        grad = row_max.new_zeros(ctx.chunks)
    inputs = *tensors, ctx.width, ctx.chunks, ctx.temperature, ctx.divergence, ctx.tail
    grad_nll = None if tensors[8] is None else grad_nll
    rows = row_max, row_scale, ce_scale
    return torch.ops.chassis.projection_kl_backward(grad, grad_nll, *inputs, *rows), *(None,) * 13


def _reference_(out, weight, nll_weight, *arguments):
    kl, agree, nll, *rows = reference.projection_kl(*arguments)
    out.copy_(reference.projection_kl_backward(weight, nll_weight, *arguments, *rows))
    return kl, agree, nll


def _cpu(*arguments):
    out = _outputs(*arguments)
    _call(arguments, out)
    return out


def _cpu_backward(grad, grad_nll, student, *arguments):
    *arguments, row_max, row_scale, ce_scale = arguments
    out = pages.empty(student.shape, student.dtype)
    rows = row_max.contiguous(), row_scale.contiguous(), ce_scale.contiguous()
    _call((student, *arguments), (None, None, None, *rows), out, (grad, grad_nll), known=True)
    return out


def _cpu_(out, weight, nll_weight, *arguments):
    result = _outputs(*arguments)
    _call(arguments, result, out, (weight, nll_weight))
    return result[:3]


def _outputs(student, teacher, *arguments) -> tuple[Tensor, ...]:
    """Room for kl, agree, nll, row_max, row_scale and ce_scale."""
    labels, chunks, rows, dtype = arguments[6], arguments[8], student.shape[0], compute_dtype(student, teacher)
    labelled = 0 if labels is None else rows
    kl, agree = student.new_empty(chunks, dtype=dtype), student.new_empty(chunks, dtype=torch.bool)
    return kl, agree, *(student.new_empty(size, dtype=dtype) for size in (labelled, rows, rows, labelled))


def _call(inputs, result, grad=None, upstream=(None, None), known=False) -> None:
    """The extension's projection_kl, on arguments made contiguous; `result` as `_outputs` has it."""
    student = backends.rows_contiguous(inputs[0])
    upstream = [None if t is None else t.float().contiguous() for t in upstream]
    kept, arguments = cpu_arguments(*inputs[1:])
    backends._C.projection_kl(
        backends.matrix_args(student),
        arguments,
        tuple(map(address, result)),
        known,
        backends.matrix_args(grad),
        tuple(map(address, upstream)),
    )


def cpu_arguments(teacher, *arguments) -> tuple[list[Tensor | None], tuple]:
    """All but the student as the extension takes it, and the tensors behind the addresses: to be kept until it returns."""
    teacher, kept = backends.rows_contiguous(teacher), [None if t is None else t.contiguous() for t in arguments[:7]]
    start, rows, weights, columns, student_chunk, teacher_chunk, labels = map(address, kept)
    width, chunks, *options = arguments[7:]
    return [teacher, *kept], (
        backends.matrix_args(teacher),
        (start, rows, weights, len(kept[0]) - 1),
        (columns, len(kept[3])),
        (student_chunk, teacher_chunk, chunks),
        labels,
        width,
        tuple(options),
    )


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _cpu_top(teacher, keep, k):
    out = torch.empty(min(k, teacher.shape[1]), dtype=torch.int64)
    teacher, keep = backends.rows_contiguous(teacher), None if keep is None else keep.contiguous()
    backends._C.top_columns(backends.matrix_args(teacher), 0 if keep is None else keep.data_ptr(), len(out), out.data_ptr())
    return out


def _fake_top(teacher, keep, k):
    return teacher.new_empty(min(k, teacher.shape[1]), dtype=torch.int64)


def _example(device: str) -> tuple:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator) for shape in ((5, 7), (4, 6)))
    ids = torch.tensor([[0, 5], [1, -1], [2, 1], [3, -1], [0, 2], [4, 3], [-1, -1]])
    view = SparseProjection(ids, torch.rand(7, 2, generator=generator), 6).columns
    ids = ([0, 1, 3, 5], [0, 0, -1, 1, 2], [0, 1, 1, -1], [2, -1, 6, 0, -1])
    tensors = (student, teacher, *view, *(torch.tensor(t) for t in ids))
    return *(t.to(device) for t in tensors), 7, 3, 2.0, DIVERGENCES.index("js"), True


def _example_backward(device: str) -> tuple:
    *upstream, _ = _example_weights(device)
    arguments = _example(device)
    return *upstream, *arguments, *reference.projection_kl(*arguments)[3:]


def _example_into(device: str) -> tuple:
    *upstream, out = _example_weights(device)
    return out, *upstream, *_example(device)


def _example_weights(device: str) -> tuple[Tensor, ...]:
    grad, grad_nll = ([0.5, -2.0, 1.0], [1.0, 3.0, 0.0, -0.5, 2.0])
    return *(torch.tensor(t, device=device) for t in (grad, grad_nll)), torch.empty(5, 7, device=device)


def _example_top(device: str) -> tuple:
    return _example(device)[1], torch.tensor([True, False, True, True], device=device), 3


backends.register(
    f"projection_kl({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.projection_kl,
    fake=_outputs,
    example=_example,
    cpu=backends.Implementation(_cpu, _CPU_DTYPES, "x86-64"),
    triton=backends.triton_kernel("projection_kl", "projection_kl"),
    cuda=backends.cuda_kernel("projection_kl", "projection_kl"),
)
backends.register(
    f"projection_kl_backward(Tensor grad, Tensor? grad_nll, {_INPUTS}, Tensor row_max, Tensor row_scale, Tensor ce_scale) "
    "-> Tensor",
    reference=reference.projection_kl_backward,
    fake=lambda grad, grad_nll, student, *arguments: torch.empty_like(student),
    example=_example_backward,
    inputs=slice(2, None),
    cpu=backends.Implementation(_cpu_backward, _CPU_DTYPES, "x86-64"),
    triton=backends.triton_kernel("projection_kl", "projection_kl_backward"),
    cuda=backends.cuda_kernel("projection_kl", "projection_kl_backward"),
)
backends.register(
    f"projection_kl_(Tensor(a!) out, Tensor weight, Tensor? nll_weight, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    reference=_reference_,
    fake=lambda out, weight, nll_weight, *arguments: _outputs(*arguments)[:3],
    example=_example_into,
    cpu=backends.Implementation(_cpu_, _CPU_DTYPES, "x86-64"),
    triton=backends.triton_kernel("projection_kl", "projection_kl_"),
    cuda=backends.cuda_kernel("projection_kl", "projection_kl_"),
)
backends.register(
    "top_columns(Tensor teacher, Tensor? keep, SymInt k) -> Tensor",
    reference=reference.top_columns,
    fake=_fake_top,
    example=_example_top,
    cpu=backends.Implementation(_cpu_top, _CPU_DTYPES, "x86-64"),
    triton=backends.triton_kernel("top_columns", "top_columns"),
)
torch.library.register_autograd("chassis::projection_kl", _backward, setup_context=_setup_context, lib=backends.library)
backends.no_second_derivative("projection_kl", "use xtoken_loss(..., eager=True)")
