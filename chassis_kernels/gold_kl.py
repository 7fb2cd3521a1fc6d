"""The gold loss (relaxed: H-KL): KL on the tokens two vocabularies share, sorted L1 on the rest.

The equations stand in `reference/gold_kl.py`. No [T, V] tensor is made besides the gradient, and none is saved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chassis_kernels import backends
from chassis_kernels.chunks import Chunks, check_chunks
from chassis_kernels.parallel import gold_kl as sharded
from chassis_kernels.parallel.groups import ONE_RANK, Parallel
from chassis_kernels.reference import gold_kl as reference
from chassis_kernels.reference.precision import compute_dtype
from chassis_kernels.sparse import SparseProjection

_INPUTS = (
    "Tensor student, Tensor teacher, Tensor students, Tensor teachers, Tensor student_chunk, Tensor teacher_chunk, "
    "int chunks, float temperature, int uncommon_topk, bool reverse"
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
    parallel: Parallel = ONE_RANK,
) -> tuple[Tensor, dict[str, Tensor]]:
    """τ² (Σ common + Σ l1) / D over the chunks that count, in nats and probability, [] float32 (float64 if logits are);
    and {kl_common, l1_uncommon, proj_accuracy, num_valid_chunks}, the first two without τ².

    The mapped tokens are `projection.exact_map(relaxed=relaxed)`. A chunk counts when it is valid (with `exact_only` also
    correct), has predicting positions on both sides and a sample mask that is not 0. D is `denominator`, else the number of
    chunks that count; at least 1. `reverse` swaps the roles in the common part.

    parallel: the groups over which vocabulary and sequence are spread; logits and chunk ids are then this rank's.

    Differentiable in student_logits. Raises ValueError for shapes, dtypes or ids that do not fit.
    """
    size = projection.n_student
    if student_logits.dim() == 3 and parallel.head(student_logits) != size:
        raise ValueError(f"student_logits have {parallel.head(student_logits)} columns, expected the projection's {size}")
    check_chunks(student_logits, teacher_logits, projection.shape, chunks, sample_mask, parallel)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: expected a positive number")
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
        return sharded.loss(student_logits, teacher_logits, projection, chunks, parallel, **options)
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


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("gold_kl has no second derivative: use xtoken_loss(..., eager=True)")


def _cpu(student, teacher, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    chunks = arguments[4]
    out = torch.empty(chunks), torch.empty(chunks), torch.empty(chunks, dtype=torch.bool)
    _call(student, teacher, *arguments, out, None)
    return out


def _cpu_backward(grad_common, grad_l1, student, *arguments) -> Tensor:
    out = torch.empty(student.shape, dtype=student.dtype)
    _call(student, *arguments, (grad_common.float().contiguous(), grad_l1.float().contiguous()), out)
    return out


def _call(
    student, teacher, students, teachers, student_chunk, teacher_chunk, chunks, temperature, topk, reverse, result, grad
) -> None:
    """The extension's gold_kl: `result` is common, l1 and agree, or with `grad` the weights of common and l1."""
    student, teacher = backends.rows_contiguous(student), backends.rows_contiguous(teacher)
    ids = [t.contiguous() for t in (students, teachers, student_chunk, teacher_chunk)]
    addresses = [t.data_ptr() for t in result]
    backends._C.gold_kl(
        backends.matrix_args(student),
        backends.matrix_args(teacher),
        (ids[0].data_ptr(), ids[1].data_ptr(), len(ids[0])),
        (ids[2].data_ptr(), ids[3].data_ptr(), chunks),
        temperature,
        topk,
        reverse,
        *addresses[:2],
        addresses[2] if grad is None else 0,
        backends.matrix_args(grad),
    )


def _fake(student, teacher, *arguments):
    dtypes = (compute_dtype(student, teacher),) * 2 + (torch.bool,)
    return tuple(student.new_empty(arguments[4], dtype=dtype) for dtype in dtypes)


def _example(device: str) -> tuple:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator).to(device) for shape in ((5, 7), (4, 6)))
    ids = ([0, 4, 2], [1, 3, 5], [0, 0, -1, 1, 2], [0, 1, 1, -1])
    return student, teacher, *(torch.tensor(t, device=device) for t in ids), 3, 2.0, 2, False


def _example_backward(device: str) -> tuple:
    return *(torch.tensor(t, device=device) for t in ([0.5, -2.0, 1.0], [1.0, 0.5, 0.0])), *_example(device)


backends.register(
    f"gold_kl({_INPUTS}) -> (Tensor, Tensor, Tensor)",
    reference=reference.gold_kl,
    fake=_fake,
    example=_example,
    cpu=backends.Implementation(_cpu, _CPU_DTYPES, "x86-64"),
)
backends.register(
    f"gold_kl_backward(Tensor grad_common, Tensor grad_l1, {_INPUTS}) -> Tensor",
    reference=reference.gold_kl_backward,
    fake=lambda grad_common, grad_l1, student, *arguments: torch.empty_like(student),
    example=_example_backward,
    inputs=slice(2, None),
    cpu=backends.Implementation(_cpu_backward, _CPU_DTYPES, "x86-64"),
)
torch.library.register_autograd(
    "chassis::gold_kl", _backward, setup_context=_setup_context, lib=backends.library
)
torch.library.register_autograd(
    "chassis::gold_kl_backward",
    _no_second_derivative,
    setup_context=lambda ctx, inputs, output: None,
    lib=backends.library,
)
