"""KL between models that share a tokenizer, position by position: within the teacher's top columns, or over all tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from chassis_kernels import backends, pages
from chassis_kernels.chunks import check_temperature
from chassis_kernels.grad_buffer import at_once, hand_over, one_pass
from chassis_kernels.parallel import token_kl as sharded
from chassis_kernels.parallel.groups import ONE_RANK, Parallel
from chassis_kernels.reference import token_kl as reference
from chassis_kernels.reference.precision import compute_dtype
from chassis_kernels.teacher import Teacher, compact, logits_shaped

_INPUTS = "Tensor student, Tensor teacher, Tensor? columns, Tensor? keep, float temperature, bool reverse"
_CPU_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def token_kl(
    student_logits: Tensor,  # [B, T, V]
    teacher_logits: Teacher,  # [B, T, >= V]; with vocab_topk also a TeacherHead or TopK
    mask: Tensor,  # [B, T] weights
    *,
    temperature: float = 1.0,
    vocab_topk: int | None = None,
    reverse: bool = False,
    n_tokens: Tensor | float,
    column_mask: Tensor | None = None,  # [B, T] bool
    grad_buffer: Tensor | None = None,  # [B, T, V]
    parallel: Parallel = ONE_RANK,
) -> Tensor:
    """τ² Σ mask KL(teacher ‖ student) / (n_tokens + 1e-8) in nats, [] float32 (float64 if logits are).

    With vocab_topk both sides are normalised within the columns that reach the largest teacher logits anywhere in the
    batch (positions outside `column_mask` do not vote; ties go to the lowest id); None: over all V tokens. `reverse`:
    KL(student ‖ teacher). Rows of mask 0 are not read.

    Differentiable in student_logits. The gradient of float32 and bfloat16 logits is made in the same pass as the loss and
    held until backward. grad_buffer, of the logits' shape and dtype: it is written there, and backward returns the buffer,
    once; a second backward raises. It may be student_logits itself, whose values are then lost. Unused where no gradient is
    asked for.

    parallel: the groups over which vocabulary and sequence are spread; logits and masks are then this rank's. All ranks give
    a grad_buffer, or none; the gradient, made apart, is copied there.

    Raises ValueError for shapes and dtypes that do not fit.
    """
    shaped = logits_shaped(teacher_logits, parallel.head(student_logits))
    _check(student_logits, shaped, mask, temperature, vocab_topk, column_mask, parallel)
    if not isinstance(teacher_logits, Tensor):
        if vocab_topk is None:
            raise ValueError(f"a {type(teacher_logits).__name__} needs vocab_topk: give the teacher's logits")
        chosen = {"column_mask": column_mask, "parallel": parallel}
        columns, found = compact(teacher_logits, parallel.head(student_logits), vocab_topk, **chosen)
        student, spread = parallel.select(student_logits, columns)
        options = {"temperature": temperature, "reverse": reverse, "n_tokens": n_tokens}
        if grad_buffer is None or not (torch.is_grad_enabled() and student_logits.requires_grad):
            return token_kl(student, found, mask, **options, parallel=spread)
        gradient = one_pass(student_logits, grad_buffer)
        leaf = student.detach().requires_grad_()
        loss = token_kl(leaf, found, mask, **options, parallel=spread)
        gradient.zero_().index_copy_(-1, parallel.own(student_logits, columns), *torch.autograd.grad(loss, leaf))
        return hand_over(loss.detach(), student_logits, gradient, "token_kl", None)
    if parallel.sharded:
        options = {
            "temperature": temperature,
            "vocab_topk": vocab_topk,
            "reverse": reverse,
            "n_tokens": n_tokens,
            "column_mask": column_mask,
        }

        def run(logits):
            return sharded.loss(logits, teacher_logits, mask, parallel, **options), None

        return at_once(run, student_logits, grad_buffer, "token_kl")[0]
    width = student_logits.shape[-1]
    student, teacher = (t.flatten(0, 1) for t in (student_logits, teacher_logits.detach()[..., :width]))
    columns = None
    if vocab_topk is not None:
        votes = None if column_mask is None else column_mask.flatten()
        columns = torch.ops.chassis.top_columns(teacher, votes, vocab_topk)
    mask = mask.flatten().to(compute_dtype(student, teacher))
    options = columns, mask != 0, float(temperature), reverse
    factor = temperature**2 / (n_tokens + reference.TOKENS_EPS)
    gradient = one_pass(student_logits, grad_buffer, mask, n_tokens)
    if gradient is not None:
        op, weight = torch.ops.chassis.token_kl_, (factor * mask).detach()
        with torch.no_grad():
            arguments = student.detach(), teacher, *options
            kl = op(gradient.flatten(0, 1), weight, *arguments)
            loss = factor * torch.where(mask != 0, mask * kl, 0.0).sum()
        again = (op, weight, *arguments) if grad_buffer is None else (None,)
        return hand_over(loss, student_logits, gradient, "token_kl", *again)
    kl = torch.ops.chassis.token_kl(student, teacher, *options)
    return factor * torch.where(mask != 0, mask * kl, 0.0).sum()


def _check(student, teacher, mask, temperature, vocab_topk, column_mask, parallel) -> None:
    fits = student.dim() == 3 and teacher.dim() == 3 and teacher.shape[:2] == student.shape[:2]
    if not fits or not 0 < parallel.head(student) <= teacher.shape[2]:
        raise ValueError(
            f"student_logits are {tuple(student.shape)} and teacher_logits {tuple(teacher.shape)}: expected "
            "[B, T, V > 0] and [B, T, >= V]"
        )
    for name, logits in (("student", student), ("teacher", teacher)):
        if logits.dtype not in backends.DTYPE_CODES:
            raise ValueError(f"{name}_logits are {logits.dtype}, expected floats")
    if mask.shape != student.shape[:2]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {tuple(student.shape[:2])}")
    if column_mask is not None and (column_mask.shape != student.shape[:2] or column_mask.dtype != torch.bool):
        raise ValueError(
            f"column_mask is {column_mask.dtype} {tuple(column_mask.shape)}, expected torch.bool {tuple(student.shape[:2])}"
        )
    check_temperature(temperature)
    if vocab_topk is not None and vocab_topk < 1:
        raise ValueError(f"vocab_topk is {vocab_topk}: expected at least 1")


def _setup_context(ctx, inputs, output):
    *tensors, ctx.temperature, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    if grad is None or not ctx.needs_input_grad[0]:
        return (None,) * 6
    return torch.ops.chassis.token_kl_backward(grad, *ctx.saved_tensors, ctx.temperature, ctx.reverse), *(None,) * 5


def _reference_(out, weight, *arguments) -> Tensor:
    kl = reference.token_kl(*arguments)
    out.copy_(reference.token_kl_backward(weight, *arguments))
    return kl


def _cpu(*arguments) -> Tensor:
    kl = _fake(*arguments)
    _call(arguments, kl)
    return kl


def _cpu_backward(grad, student, *arguments) -> Tensor:
    out = pages.empty(student.shape, student.dtype)
    _call((student, *arguments), None, grad, out)
    return out


def _cpu_(out, weight, *arguments) -> Tensor:
    kl = _fake(*arguments)
    _call(arguments, kl, weight, out)
    return kl


def _call(inputs, kl, weight=None, grad=None) -> None:
    """The extension's token_kl: fills `kl` and `grad`, as far as they are given."""
    student, teacher = (backends.rows_contiguous(t) for t in inputs[:2])
    columns, keep = (None if t is None else t.contiguous() for t in inputs[2:4])
    temperature, reverse = inputs[4:]
    weight = None if weight is None else weight.float().contiguous()
    backends._C.token_kl(
        backends.matrix_args(student),
        backends.matrix_args(teacher),
        0 if columns is None else columns.data_ptr(),
        student.shape[1] if columns is None else len(columns),
        0 if keep is None else keep.data_ptr(),
        temperature,
        reverse,
        0 if kl is None else kl.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        backends.matrix_args(grad),
    )


def _fake(student, teacher, *arguments):
    return student.new_empty(student.shape[0], dtype=compute_dtype(student, teacher))


def _example(device: str) -> tuple:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator).to(device) for shape in ((4, 7), (4, 9)))
    columns, keep = torch.tensor([0, 2, 3, 6], device=device), torch.tensor([True, True, False, True], device=device)
    return student, teacher, columns, keep, 2.0, False


def _example_backward(device: str) -> tuple:
    return torch.tensor([0.5, -2.0, 1.0, 0.0], device=device), *_example(device)


def _example_into(device: str) -> tuple:
    return torch.empty(4, 7, device=device), torch.tensor([0.5, -2.0, 1.0, 0.0], device=device), *_example(device)


backends.register(
    f"token_kl({_INPUTS}) -> Tensor",
    reference=reference.token_kl,
    fake=_fake,
    example=_example,
    cpu=backends.Implementation(_cpu, _CPU_DTYPES, "x86-64"),
    triton=backends.triton_kernel("token_kl", "token_kl"),
)
backends.register(
    f"token_kl_backward(Tensor grad, {_INPUTS}) -> Tensor",
    reference=reference.token_kl_backward,
    fake=lambda grad, student, *arguments: torch.empty_like(student),
    example=_example_backward,
    inputs=slice(1, None),
    cpu=backends.Implementation(_cpu_backward, _CPU_DTYPES, "x86-64"),
    triton=backends.triton_kernel("token_kl", "token_kl_backward"),
)
backends.register(
    f"token_kl_(Tensor(a!) out, Tensor weight, {_INPUTS}) -> Tensor",
    reference=_reference_,
    fake=lambda out, weight, *arguments: _fake(*arguments),
    example=_example_into,
    cpu=backends.Implementation(_cpu_, _CPU_DTYPES, "x86-64"),
    triton=backends.triton_kernel("token_kl", "token_kl_"),
)
torch.library.register_autograd("chassis::token_kl", _backward, setup_context=_setup_context, lib=backends.library)
backends.no_second_derivative("token_kl", "use xtoken_loss(..., eager=True)")
