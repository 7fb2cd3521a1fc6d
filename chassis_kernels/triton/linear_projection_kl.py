"""projection_kl from hidden states and unembedding; the equations stand in `reference/linear_projection_kl.py`.

Rows go chunk by chunk, whole chunks together. A product of torch fills a float32 block [rows, V_s] with their logits, the
kernels of projection_kl leave the gradient there, and two products carry it on to hidden states and weight:

    finish         z = cap(z + bias), where there is a bias or a cap
    through_cap    dz (1 - (z / s)²), where there is a cap: then z and dz need a block each

Besides there is the teacher's Q [C, k], made once, and a copy of the rows of the weight that `ids` choose.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chassis_kernels.linear_projection_kl import block_rows
from chassis_kernels.reference.linear_projection_kl import weight_gradient_dtype
from chassis_kernels.reference.precision import without_autocast
from chassis_kernels.triton import projection_kl as logits_loss
from chassis_kernels.triton.products import product
from chassis_kernels.triton.shared import launch, tanh

OP = "linear_projection_kl"


@triton.jit
def finish(
    z,  # [N, V] float32, replaced
    bias,  # [V], or None
    softcap,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < width
    b_z = tl.load(z + row * width + o, mask=m, other=0.0)
    if bias is not None:
        b_z += tl.load(bias + o, mask=m, other=0.0).to(tl.float32)
    if softcap is not None:
        b_z = softcap * tanh(b_z / softcap)
    tl.store(z + row * width + o, b_z, mask=m)


@triton.jit
def through_cap(
    dz,  # [N, V] float32, replaced
    z,  # [N, V] float32
    softcap,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < width
    b_share = tl.load(z + row * width + o, mask=m, other=0.0) / softcap
    b_dz = tl.load(dz + row * width + o, mask=m, other=0.0)
    tl.store(dz + row * width + o, b_dz * (1 - b_share * b_share), mask=m)


@without_autocast
def linear_projection_kl(*inputs) -> tuple[Tensor, ...]:
    return _run(None, None, *inputs, (False, False, False))[:4]


@without_autocast
def linear_projection_kl_backward(grad: Tensor, *inputs) -> tuple[Tensor, ...]:
    return _run(grad, *inputs)


def _run(grad, grad_nll, hidden, weight, bias, ids, softcap, *arguments) -> tuple[Tensor, ...]:
    *arguments, needs = arguments
    inputs = logits_loss.Inputs(hidden, *arguments).contiguous()
    hidden, labels, width, chunks = inputs.student, inputs.labels, inputs.width, inputs.chunks
    chosen = slice(0, width) if ids is None else ids
    W, shift = weight[chosen], None if bias is None else bias[chosen].contiguous()

    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device=hidden.device)

    labelled = 0 if labels is None else len(hidden)
    kl, agree, nll = zeros(chunks), zeros(chunks, dtype=torch.bool), zeros(labelled)
    correct = zeros(labelled, dtype=torch.bool)
    grads = [zeros(*t.shape) if need else zeros(0) for t, need in zip((hidden, weight, bias), needs, strict=True)]
    grad_W = (grads[1][:width] if ids is None else zeros(*W.shape)) if needs[1] else None
    plan = logits_loss._plan(inputs)
    Q, q_tail = logits_loss._teacher(plan, inputs)
    blocks = _blocks(plan, labels, block_rows(len(hidden)))
    size = max((len(rows) for rows, *_ in blocks), default=0)
    room = hidden.new_empty(1 if softcap is None or not any(needs) else 2, size, width, dtype=torch.float32)
    for rows, first, last in blocks:
        z, dz, part = room[0, : len(rows)], room[-1, : len(rows)], slice(first, last)
        product(hidden[rows], W.t(), z)
        if shift is not None or softcap is not None:
            _over_tiles(finish, z, z=z, bias=shift, softcap=softcap)
        of_block = plan._replace(
            student_chunk=plan.student_chunk[rows] - first, paired=plan.paired[part], counts=plan.counts[part]
        )
        given = inputs._replace(student=z, labels=None if labels is None else labels[rows], chunks=last - first)
        found, *statistics = logits_loss._statistics(of_block, given)
        a = logits_loss._student(of_block, given, *statistics[:2])
        sides = a, Q[part], None if q_tail is None else q_tail[part]
        kl[part], agree[part] = logits_loss._compare(of_block, given, sides)
        if labels is not None:
            nll[rows] = found
            at_label = z.gather(1, given.labels.clamp_min(0)[:, None])[:, 0]
            correct[rows] = (given.labels >= 0) & (at_label == statistics[0])
        if not any(needs):
            continue
        upstream = grad[part], None if grad_nll is None else grad_nll[rows]
        logits_loss._gradient(of_block, given, dz, *upstream, sides, statistics)
        if softcap is not None:
            _over_tiles(through_cap, dz, dz=dz, z=z, softcap=softcap)
        if needs[0]:
            grads[0][rows] = product(dz, W, zeros(len(rows), W.shape[1]))
        if needs[1]:
            product(dz.t(), hidden[rows], grad_W, add=True)
        if needs[2]:
            grads[2][chosen] += dz.sum(0)
    if needs[1] and ids is not None:
        grads[1][ids] = grad_W
    grads[1] = grads[1].to(weight_gradient_dtype(hidden, weight, torch.float32))
    return kl, agree, nll, correct, *grads


def _blocks(plan: logits_loss.Plan, labels: Tensor | None, most: int) -> list[tuple[Tensor, int, int]]:
    """(rows, first and last chunk): at most `most` rows, or the rows of one longer chunk; those of no chunk, if labelled."""
    sizes, blocks = torch.where(plan.paired, plan.counts, 0).tolist(), []
    order = torch.argsort(plan.student_chunk, stable=True)
    loose, order = order[: len(order) - sum(sizes)], order[len(order) - sum(sizes) :]
    if labels is not None:
        loose = loose[labels[loose] >= 0]
        blocks += [(rows, 0, 0) for rows in loose.split(most) if len(rows)]
    begin = first = taken = 0
    for chunk, size in enumerate([*sizes, most]):
        if taken and taken + size > most:
            blocks.append((order[begin : begin + taken], first, chunk))
            begin, first, taken = begin + taken, chunk, 0
        taken += size
    return blocks


def _over_tiles(kernel, block: Tensor, **arguments) -> None:
    n, width = block.shape
    launch(OP, kernel, lambda meta: (n, triton.cdiv(width, meta["BLOCK"])), width, width=width, **arguments)
