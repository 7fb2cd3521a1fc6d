"""The gold loss (relaxed: H-KL): KL on the tokens two vocabularies share, sorted L1 on the rest.

The equations stand in `reference/gold_kl.py`. No [T, V] tensor is made besides the gradient, and none is saved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chassis_kernels import backends, pages
from chassis_kernels.chunks import Chunks, check_chunks, check_temperature, layout
from chassis_kernels.grad_buffer import at_once, hand_over, one_pass
from chassis_kernels.parallel import gold_kl as sharded
from chassis_kernels.parallel.groups import ONE_RANK, Parallel
from chassis_kernels.reference import gold_kl as reference
from chassis_kernels.reference.precision import compute_dtype
from chassis_kernels.sparse import SparseProjection

_INPUTS = (
    "Tensor student, Tensor teacher, Tensor students, Tensor teachers, Tensor student_chunk, Tensor teacher_chunk, "
    "SymInt chunks, float temperature, int uncommon_topk, bool reverse"
)
_CPU_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def gold_kl(
    student_logits: Tensor,  # [B, T_s, V_s]
    teacher_logits: Tensor,  # [B, T_t, >= V_t]
    projection: SparseProjection,  # [V_s, V_t]
    chunks: Chunks,
    *,
    temperature: float = 1.0,
    uncommon_topk: int = 8192,
    reverse: bool = False,
    relaxed: bool = False,
    exact_only: bool = False,
    sample_mask: Tensor | None = None,  # [B]
    denominator: Tensor | float | None = None,
    grad_buffer: Tensor | None = None,  # [B, T_s, V_s]
    parallel: Parallel = ONE_RANK,
) -> tuple[Tensor, dict[str, Tensor]]:
    """τ² (Σ common + Σ l1) / D over the chunks that count, in nats and probability, [] float32 (float64 if logits are);
    and {kl_common, l1_uncommon, proj_accuracy, num_valid_chunks}, the first two without τ².

    The mapped tokens are `projection.exact_map(relaxed=relaxed)`. A chunk counts when it is valid (with `exact_only` also
    correct), has predicting positions on both sides and a sample mask that is not 0. D is `denominator`, else the number of
    chunks that count; at least 1. `reverse` swaps the roles in the common part.

    Differentiable in student_logits. The gradient of float32 and bfloat16 logits is made in the same pass as the loss and
    held until backward. grad_buffer, of the logits' shape and dtype: it is written there, and backward returns the buffer,
    once; a second backward raises. It may be student_logits itself, whose values are then lost. Unused where no gradient is
    asked for.

    parallel: the groups over which vocabulary and sequence are spread; logits and chunk ids are then this rank's. All ranks
    give a grad_buffer, or none; the gradient, made apart, is copied there.

    Raises ValueError for shapes, dtypes or ids that do not fit.
    """
    size = projection.n_student
    if student_logits.dim() == 3 and parallel.head(student_logits) != size:
        raise ValueError(f"student_logits have {parallel.head(student_logits)} columns, expected the projection's {size}")
    check_chunks(student_logits, teacher_logits, projection.shape, chunks, sample_mask, parallel)
    check_temperature(temperature)
    if uncommon_topk < 0:
        raise ValueError(f"uncommon_topk is {uncommon_topk}: expected 0 or more")
    options = {
        "temperature": temperature,
        "uncommon_topk": uncommon_topk,
        "reverse": reverse,
        "relaxed": relaxed,
        "exact_only": exact_only,
        "sample_mask": sample_mask,
        "denominator": denominator,
    }
    if parallel.sharded:
        rest = teacher_logits, projection, chunks, parallel
        return at_once(lambda logits: sharded.loss(logits, *rest, **options), student_logits, grad_buffer, "gold_kl")
    gradient = one_pass(student_logits, grad_buffer, sample_mask, denominator)
    if gradient is not None:
        op = torch.ops.chassis.gold_kl_
        with torch.no_grad():
            plan = layout(chunks, sample_mask, exact_only, compute_dtype(student_logits, teacher_logits))
            rest = relaxed, (float(temperature), uncommon_topk, reverse)
            arguments = reference.op_arguments(student_logits, teacher_logits, projection, plan, *rest)
            weight = (temperature**2 / reference.divide_by(plan, denominator)).expand(len(plan.weight))
            parts = op(gradient.flatten(0, 1), weight, *arguments)
            loss, metrics = reference.combine(*parts, plan, temperature, denominator)
        again = (op, weight, *arguments) if grad_buffer is None else (None,)
        return hand_over(loss, student_logits, gradient, "gold_kl", *again), metrics
    op = torch.ops.chassis.gold_kl
    return reference.loss(student_logits, teacher_logits, projection, chunks, **options, op=op)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.chunks, ctx.temperature, ctx.uncommon_topk, ctx.reverse = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_common, grad_l1, _):
    tensors = ctx.saved_tensors
    if not ctx.needs_input_grad[0]:
        return (None,) * 10
    zeros = tensors[0].new_zeros(ctx.chunks, dtype=compute_dtype(*tensors[:2]))
    grads = (zeros if grad is None else grad for grad in (grad_common, grad_l1))
    options = ctx.chunks, ctx.temperature, ctx.uncommon_topk, ctx.reverse
    return torch.ops.chassis.gold_kl_backward(*grads, *tensors, *options), *(None,) * 9


def _reference_(out, weight, *arguments):
    parts = reference.gold_kl(*arguments)
    out.copy_(reference.gold_kl_backward(weight, weight, *arguments))
    return parts


def _cpu(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    parts = _parts(*arguments)
    _call(arguments, parts)
    return parts


def _cpu_backward(grad_common, grad_l1, student, *arguments) -> Tensor:
    out = pages.empty(student.shape, student.dtype)
    _call((student, *arguments), None, (grad_common, grad_l1), out)
    return out


def _cpu_(out, weight, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    parts = _parts(*arguments)
    _call(arguments, parts, (weight, weight), out)
    return parts


def _parts(student, teacher, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Room for common, l1 and agree."""
    dtypes = (compute_dtype(student, teacher),) * 2 + (torch.bool,)
    return tuple(student.new_empty(arguments[4], dtype=dtype) for dtype in dtypes)


def _call(inputs, parts, weights=None, grad=None) -> None:
    """The extension's gold_kl: fills `parts` (common, l1, agree) and `grad`, as far as they are given."""
    student, teacher = (backends.rows_contiguous(t) for t in inputs[:2])
    students, teachers, student_chunk, teacher_chunk = ids = [t.contiguous() for t in inputs[2:6]]
    weights = None if weights is None else [t.float().contiguous() for t in weights]
    chunks, temperature, topk, reverse = inputs[6:]
    backends._C.gold_kl(
        backends.matrix_args(student),
        backends.matrix_args(teacher),
        (students.data_ptr(), teachers.data_ptr(), len(ids[0])),
        (student_chunk.data_ptr(), teacher_chunk.data_ptr(), chunks),
        temperature,
        topk,
        reverse,
        (0, 0, 0) if parts is None else tuple(t.data_ptr() for t in parts),
        (0, 0) if weights is None else tuple(t.data_ptr() for t in weights),
        backends.matrix_args(grad),
    )


def _example(device: str) -> tuple:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator).to(device) for shape in ((5, 7), (4, 6)))
    ids = ([0, 4, 2], [1, 3, 5], [0, 0, -1, 1, 2], [0, 1, 1, -1])
    return student, teacher, *(torch.tensor(t, device=device) for t in ids), 3, 2.0, 2, False


def _example_backward(device: str) -> tuple:
    return *(torch.tensor(t, device=device) for t in ([0.5, -2.0, 1.0], [1.0, 0.5, 0.0])), *_example(device)


def _example_into(device: str) -> tuple:
    return torch.empty(5, 7, device=device), torch.tensor([0.5, -2.0, 1.0], device=device), *_example(device)


backends.register(
    f"gold_kl({_INPUTS}) -> (Tensor, Tensor, Tensor)",
    reference=reference.gold_kl,
    fake=_parts,
    example=_example,
    cpu=backends.Implementation(_cpu, _CPU_DTYPES, "x86-64"),
    triton=backends.triton_kernel("gold_kl", "gold_kl"),
)
backends.register(
    f"gold_kl_backward(Tensor grad_common, Tensor grad_l1, {_INPUTS}) -> Tensor",
    reference=reference.gold_kl_backward,
    fake=lambda grad_common, grad_l1, student, *arguments: torch.empty_like(student),
    example=_example_backward,
    inputs=slice(2, None),
    cpu=backends.Implementation(_cpu_backward, _CPU_DTYPES, "x86-64"),
    triton=backends.triton_kernel("gold_kl", "gold_kl_backward"),
)
backends.register(
    f"gold_kl_(Tensor(a!) out, Tensor weight, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    reference=_reference_,
    fake=lambda out, weight, *arguments: _parts(*arguments),
    example=_example_into,
    cpu=backends.Implementation(_cpu_, _CPU_DTYPES, "x86-64"),
    triton=backends.triton_kernel("gold_kl", "gold_kl_"),
)
torch.library.register_autograd("chassis::gold_kl", _backward, setup_context=_setup_context, lib=backends.library)
backends.no_second_derivative("gold_kl", "use xtoken_loss(..., eager=True)")
