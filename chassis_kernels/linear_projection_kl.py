"""projection_kl from the student's hidden states and unembedding: the loss and its gradients without [T, V] logits.

The logits exist for one block of rows at a time. Since the loss is a sum with known weights, its gradients are made in the
pass that makes the loss: three matrix products in all (logits, dh, dW), as many as with the logits stored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from chassis_kernels import backends, pages
from chassis_kernels import projection_kl as logits_loss
from chassis_kernels.backends import DTYPE_CODES
from chassis_kernels.chunks import Chunks, Layout, check_chunks, layout
from chassis_kernels.reference import linear_projection_kl as reference
from chassis_kernels.reference.precision import compute_dtype
from chassis_kernels.reference.projection_kl import DIVERGENCES, chunk_weights, stats, weighted_sum
from chassis_kernels.sparse import SparseProjection, take_columns
from chassis_kernels.teacher import Operands, Teacher, logits_shaped, operands

BLOCK_ROWS = (96, 256)  # whose logits exist at a time: at least, at most; between them a fifth of all rows
RESTRICT_BELOW = 0.9  # share of touched rows of W from which on leaving out the others does not pay

_ops = torch.ops.chassis
_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? ids, float? softcap, " + logits_loss._INPUTS.removeprefix(
    "Tensor student, "
)


class LinearProjectionKLStats(NamedTuple):
    """What the loss also knows. Only nll has a gradient, and that only without label_weight."""

    accuracy: Tensor  # [] share of the paired chunks where student and teacher prefer the same column of J
    valid_pairs: Tensor  # [] int64 chunks that enter the loss
    chunk_kl: Tensor  # [B, C] nats, 0 where there is no pair; neither weighted nor scaled by τ²
    columns: Tensor  # [k] int64, J
    nll: Tensor | None  # [B, T_s] nats, 0 without a label; None: no labels given
    correct: Tensor | None  # [B, T_s] bool: no logit is above the label's; None: no labels given
    touched: float  # share of the student's tokens whose logits were made; 1: all


def linear_projection_kl(
    student_hidden: Tensor,  # [B, T_s, D]
    student_weight: Tensor,  # [>= V_s, D]
    teacher: Teacher,  # [B, T_t, >= V_t] logits, TeacherHead or TopK
    projection: SparseProjection,  # [V_s, V_t]
    chunks: Chunks,
    *,
    student_bias: Tensor | None = None,  # [>= V_s]
    student_softcap: float | None = None,
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
    restrict: bool | None = None,
) -> tuple[Tensor, LinearProjectionKLStats]:
    """`projection_kl` of the logits cap(student_hidden student_weightᵀ + student_bias), cap(z) = s tanh(z / s), in nats.

    Options are projection_kl's. Differentiable in student_hidden, student_weight and student_bias; any of float32, bfloat16
    and float16 (float64: reference backend). Gradients are summed in float32 and rounded to their input's dtype once, that
    of a bfloat16 student_weight under bfloat16 hidden states once more where backward scales the loss. Labels without
    label_weight cost a fourth product, in the backward pass: their gradient is not known before.

    Memory besides the gradients: float32 logits [rows, V_s] of a fifth of the rows, at least 96 and at most 256, plus what
    completes a chunk; with a softcap twice these; a few MiB a thread; float32 sums where a gradient is narrower. On the CPU
    that of a bfloat16 student_weight needs, instead of its float32 sums [V_s, D], the logits' gradients [rows, V_s] in
    bfloat16 and float32 sums [rows, D] a thread, where these take less.

    restrict: where every chunk holds one student token, and there are neither tail nor labels, the loss needs the logits of
    those tokens alone that project into J; the rest of the softmax cancels in r = a / (Σa + ε), up to ε = 1e-10. Left out,
    they leave r = a / (Σa + ε ρ), with ρ the share of the student's mass on the tokens kept, and gradients of 0 instead of
    O(ε / Σa) for the others: a relative difference below ε / Σa, under float32's rounding unless the student gives J less
    than a thousandth. None: where at most nine tenths of the tokens project into J, on the CPU; False: never, the ε exactly
    as published; True: always, or ValueError.

    Raises ValueError for shapes, dtypes or ids that do not fit.
    """
    _check_head(student_hidden, student_weight, student_bias, student_softcap, projection.n_student)
    student = student_hidden.new_empty(()).expand(*student_hidden.shape[:2], projection.n_student)  # the logits' shape
    given = logits_shaped(teacher, projection.n_teacher)
    check_chunks(student, given, projection.shape, chunks, sample_mask)
    logits_loss._check(given, projection, temperature, vocab_topk, divergence, column_mask, columns)
    logits_loss._check_labels(student, projection.n_student, labels, label_weight)
    plan = layout(chunks, sample_mask, exact_only, compute_dtype(student_hidden, student_weight, given))
    found = operands(
        teacher,
        projection.columns,
        vocab_topk,
        temperature=temperature,
        tail=tail,
        column_mask=column_mask,
        columns=columns,
    )
    ids, view = _restricted(found, projection.n_student, plan, restrict, plain=not tail and labels is None)
    width = projection.n_student if ids is None else len(ids)
    arguments = (
        student_hidden.flatten(0, 1),
        student_weight,
        student_bias,
        ids,
        student_softcap,
        found.logits,
        *view,
        found.places,
        plan.student,
        plan.teacher,
        None if labels is None else labels.flatten(),
        width,
        len(plan.weight),
        float(temperature),
        DIVERGENCES.index(divergence),
        tail,
    )
    weight = chunk_weights(plan, temperature, denominator)
    label_weight = None if label_weight is None else label_weight.detach().flatten().to(weight.dtype)
    wanted = any(t is not None and t.requires_grad for t in (student_hidden, student_weight, student_bias))
    known = labels is None or label_weight is not None
    if wanted and known and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        loss, kl, agree, nll, correct = _OnePass.apply(*arguments[:3], weight, label_weight, *arguments[3:])
    else:
        kl, agree, nll, correct = _ops.linear_projection_kl(*arguments)
        loss = weighted_sum(kl, weight)
        if label_weight is not None:
            loss = loss + weighted_sum(nll, label_weight)
    if labels is None:
        nll = correct = None
    else:
        nll, correct = nll.view(labels.shape), correct.view(labels.shape)
    common = stats(plan, kl, agree, chunks, found.columns)
    return loss, LinearProjectionKLStats(*common[:4], nll, correct, width / projection.n_student)


class _OnePass(torch.autograd.Function):
    """The loss and, in the same pass, its gradients, which backward hands over; a second backward makes them again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, upstream, upstream_nll, *arguments):
        _save(ctx, (hidden, weight, bias, *arguments))
        ctx.upstream, ctx.needs = (upstream, upstream_nll), list(ctx.needs_input_grad[:3])
        inputs = hidden, weight, bias, *arguments
        kl, agree, nll, correct, *ctx.grads = _ops.linear_projection_kl_backward(*ctx.upstream, *inputs, ctx.needs)
        ctx.mark_non_differentiable(kl, agree, nll, correct)
        loss = weighted_sum(kl, upstream)
        return loss if upstream_nll is None else loss + weighted_sum(nll, upstream_nll), kl, agree, nll, correct

    @staticmethod
    def backward(ctx, grad, *_):
        inputs, grads, ctx.grads = _saved(ctx), ctx.grads, None
        if grads is None or torch.is_grad_enabled():  # with a graph of its own, which says that it has no derivative
            grads = _ops.linear_projection_kl_backward(*ctx.upstream, *inputs, ctx.needs)[4:]
        if grad.device.type != "cpu" or grad != 1:
            grads = [g.mul_(grad) for g in grads]
        return *_in_dtype(grads, inputs[:3], ctx.needs), *(None,) * (len(inputs) - 1)


def _save(ctx, inputs) -> None:
    ctx.scalars = inputs[4], *inputs[13:]
    ctx.save_for_backward(*inputs[:4], *inputs[5:13])


def _saved(ctx) -> tuple:
    tensors, (softcap, *scalars) = ctx.saved_tensors, ctx.scalars
    return *tensors[:4], softcap, *tensors[4:], *scalars


def _in_dtype(grads, inputs, needs) -> tuple[Tensor | None, ...]:
    """The gradients that are wanted, rounded to their inputs' dtypes."""
    found = []
    for grad, tensor, need in zip(grads, inputs, needs, strict=True):
        same = not need or grad.dtype == tensor.dtype
        found.append((grad if need else None) if same else pages.empty_like(tensor).copy_(grad))
    return tuple(found)


def _restricted(found: Operands, size: int, plan: Layout, restrict: bool | None, plain: bool):
    """(ids of the student's tokens that project into J, the view by places among them), or (None, the view) for all."""
    view, device = found.view, found.columns.device
    if restrict is False or (restrict is None and (device.type != "cpu" or torch.compiler.is_compiling())):
        return None, view
    single = plain and bool((plan.student_count[plan.paired] <= 1).all())
    if restrict and not single:
        raise ValueError("restrict=True needs chunks of one student token, without tail and labels")
    if not single:
        return None, view
    rows = take_columns(view, found.places).rows.long()
    place = torch.zeros(size, dtype=torch.int64, device=device)
    place[rows] = 1
    ids = place.nonzero()[:, 0]
    if len(ids) == 0 or (restrict is None and len(ids) > RESTRICT_BELOW * size):
        return None, view
    place[ids] = torch.arange(len(ids), device=device)
    return ids, view._replace(rows=place[view.rows.long()].to(view.rows.dtype))


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, size: int) -> None:
    for name, tensor, dim in (("student_hidden", hidden, 3), ("student_weight", weight, 2), ("student_bias", bias, 1)):
        if tensor is not None and (tensor.dim() != dim or tensor.dtype not in DTYPE_CODES):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected floats of {dim} dimensions")
    if weight.shape[0] < size or weight.shape[1] != hidden.shape[2]:
        raise ValueError(f"student_weight has shape {tuple(weight.shape)}, expected (>= {size}, {hidden.shape[2]})")
    if bias is not None and len(bias) != len(weight):
        raise ValueError(f"student_bias has shape {tuple(bias.shape)}, expected ({len(weight)},)")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"student_softcap is {softcap}: a softcap is positive, or None for no cap")


def _setup_context(ctx, inputs, output):
    _save(ctx, inputs)
    ctx.mark_non_differentiable(output[1], output[3])


def _backward(ctx, grad, agree, grad_nll, correct):
    inputs, needs = _saved(ctx), list(ctx.needs_input_grad[:3])
    if grad is None:
        grad = grad_nll.new_zeros(inputs[14])
    grad_nll = None if inputs[12] is None else grad_nll
    *_, grad_hidden, grad_weight, grad_bias = _ops.linear_projection_kl_backward(grad, grad_nll, *inputs, needs)
    grads = _in_dtype((grad_hidden, grad_weight, grad_bias), inputs[:3], needs)
    return *grads, *(None,) * (len(inputs) - 3)


def _outputs(hidden, weight, *arguments) -> tuple[Tensor, ...]:
    """Zeroed room for kl, agree, nll and correct."""
    labelled = 0 if arguments[10] is None else hidden.shape[0]
    dtype, chunks = compute_dtype(hidden, weight, arguments[3]), arguments[12]
    kinds = ((chunks, dtype), (chunks, torch.bool), (labelled, dtype), (labelled, torch.bool))
    return tuple(hidden.new_zeros(size, dtype=kind) for size, kind in kinds)


def _gradients(hidden, weight, bias, dtype, needs) -> tuple[Tensor, ...]:
    """Room for the gradients that are wanted."""
    kinds = dtype, reference.weight_gradient_dtype(hidden, weight, dtype), dtype
    wanted = zip((hidden, weight, bias), (torch.zeros, torch.empty, torch.zeros), kinds, needs, strict=True)
    return tuple(make(t.shape if need else 0, dtype=kind, device=hidden.device) for t, make, kind, need in wanted)


def _cpu(*inputs):
    result = _outputs(*inputs)
    _call(inputs, result)
    return result


def _cpu_backward(grad, grad_nll, *inputs):
    *inputs, needs = inputs
    result = _outputs(*inputs)
    grads = list(_gradients(*inputs[:3], torch.float32, [needs[0], False, needs[2]]))
    if needs[1]:
        weight, kind = inputs[1], grads[1].dtype
        grads[1] = pages.empty(weight.shape, kind if keeps_rows(len(inputs[0]), *weight.shape) else torch.float32)
    _call(inputs, result, (grad, grad_nll), [g if need else None for g, need in zip(grads, needs, strict=True)])
    if needs[1] and grads[1].dtype != kind:
        grads[1] = pages.empty_like(weight).copy_(grads[1])
    return *result, *grads


def _call(inputs, result, upstream=(None, None), grads=(None, None, None)) -> None:
    hidden, weight, bias = map(backends.rows_contiguous, inputs[:3])
    ids, softcap = None if inputs[3] is None else inputs[3].contiguous(), inputs[4]
    upstream = [None if t is None else t.float().contiguous() for t in upstream]
    kept, arguments = logits_loss.cpu_arguments(*inputs[5:])
    address = logits_loss.address
    backends._C.linear_projection_kl(
        (*map(backends.matrix_args, (hidden, weight, bias)), address(ids), softcap or 0.0),
        arguments,
        tuple(map(address, result)),
        tuple(map(address, upstream)),
        (*map(backends.matrix_args, grads[:2]), address(grads[2])),
        block_rows(len(hidden)),
    )


def keeps_rows(n: int, tokens: int, dimension: int) -> bool:
    """Whether a narrow gradient of the weight is summed over all n rows at once: where the logits' gradients in bfloat16,
    with the threads' parts of the gradient for the hidden states, take less than its float32 sums."""
    return n * (2 * tokens + 4 * torch.get_num_threads() * dimension) <= 4 * tokens * dimension


def block_rows(n: int) -> int:
    """How many rows of logits exist at a time, of n in all, as long as no chunk is longer."""
    least, most = BLOCK_ROWS
    return max(least, min(most, -(-n // 5)))


def _fake_backward(grad, grad_nll, *inputs):
    *inputs, needs = inputs
    hidden, weight, bias = inputs[:3]
    return *_outputs(*inputs), *_gradients(hidden, weight, bias, compute_dtype(hidden, weight, inputs[5]), needs)


def _example(device: str) -> tuple:
    generator = torch.Generator().manual_seed(1)
    head = (torch.randn(shape, generator=generator).to(device) for shape in ((5, 4), (9, 4), (9,)))
    ids = torch.tensor([0, 8, 1, 3, 5, 2, 6], device=device)
    return *head, ids, 3.0, *logits_loss._example(device)[1:]


def _example_backward(device: str) -> tuple:
    grad, grad_nll, _ = logits_loss._example_weights(device)
    return grad, grad_nll, *_example(device), [True, True, True]


_CPU = frozenset({torch.float32, torch.bfloat16, torch.float16})

backends.register(
    f"linear_projection_kl({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.linear_projection_kl,
    fake=_outputs,
    example=_example,
    cpu=backends.Implementation(_cpu, _CPU, "x86-64"),
    triton=backends.triton_kernel("linear_projection_kl", "linear_projection_kl"),
)
backends.register(
    f"linear_projection_kl_backward(Tensor grad, Tensor? grad_nll, {_INPUTS}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.linear_projection_kl_backward,
    fake=_fake_backward,
    example=_example_backward,
    inputs=slice(2, None),
    cpu=backends.Implementation(_cpu_backward, _CPU, "x86-64"),
    triton=backends.triton_kernel("linear_projection_kl", "linear_projection_kl_backward"),
)
torch.library.register_autograd(
    "chassis::linear_projection_kl", _backward, setup_context=_setup_context, lib=backends.library
)
backends.no_second_derivative("linear_projection_kl", "use reference.linear_projection_kl.loss")
