"""The gold loss; the equations stand in `reference/gold_kl.py`. For CHUNKS chunks at a time, in float32:

    teacher_statistics    each row's max and 1 / Σ exp, of both sides, for all rows at once       logit_rows.py
    chunk_means           A [CHUNKS, V_s] and B [CHUNKS, V_t]                                     chunk_sums.py
    compare, slopes       the ranks, the parts of the loss, and D = dloss/dA: torch's topk        the reference
    row_gradient          (D - p Σ D) / τ for the rows of these chunks, which may replace them: one read

Of [.., V] in float32 only a few [CHUNKS, V_s + V_t] are held.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chassis_kernels import backends
from chassis_kernels.reference import gold_kl as reference
from chassis_kernels.triton import projection_kl as rows_of
from chassis_kernels.triton.logit_rows import teacher_statistics
from chassis_kernels.triton.shared import LOG2E, launch

CHUNKS = 32


@triton.jit
def row_gradient(
    student,  # [N, V]
    out,  # [N, V], may be the student's
    members,  # [n], the rows
    chunk,  # [N]
    first,  # the number of the chunk whose slopes come first
    slopes,  # [C, V] float32
    totals,  # [C] float32, their sums
    row_max,  # [N]
    row_scale,  # [N]
    stride,
    out_stride,
    width,
    inverse,  # 1 / temperature
    scale,  # log2(e) / temperature
    BLOCK: tl.constexpr,
):
    row = tl.load(members + tl.program_id(0).to(tl.int64))
    c = tl.load(chunk + row) - first
    best, p_scale, total = tl.load(row_max + row), tl.load(row_scale + row), tl.load(totals + c)
    for start in range(0, width, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_z = tl.load(student + row * stride + o, mask=o < width, other=-float("inf")).to(tl.float32)
        b_slope = tl.load(slopes + c * width + o, mask=o < width, other=0.0)
        b_grad = (b_slope - tl.exp2((b_z - best) * scale) * p_scale * total) * inverse
        tl.store(out + row * out_stride + o, b_grad.to(out.dtype.element_ty), mask=o < width)


def gold_kl(*inputs) -> tuple[Tensor, Tensor, Tensor]:
    return _run(inputs)


def gold_kl_backward(grad_common: Tensor, grad_l1: Tensor, student: Tensor, *inputs) -> Tensor:
    out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    _run((student, *inputs), (grad_common, grad_l1), out)
    return out


def gold_kl_(out: Tensor, weight: Tensor, *inputs) -> tuple[Tensor, Tensor, Tensor]:
    return _run(inputs, (weight, weight), out)


def _run(inputs, weights=None, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """common, l1 and agree; with `out`, also the gradient for `weights` there."""
    student, teacher, students, teachers, student_chunk, teacher_chunk, chunks, temperature, topk, reverse = inputs
    student, teacher = (backends.rows_contiguous(t) for t in (student, teacher))
    common, l1 = (student.new_zeros(chunks, dtype=torch.float32) for _ in range(2))
    agree = torch.zeros(chunks, dtype=torch.bool, device=student.device)
    sides = (student, student_chunk.contiguous()), (teacher, teacher_chunk.contiguous())
    statistics = [_statistics(*side, temperature) for side in sides]
    ids = [torch.arange(logits.shape[1], device=student.device) for logits, _ in sides]
    counts = [reference.counts(chunk, chunks) for _, chunk in sides]
    paired = (counts[0] > 0) & (counts[1] > 0)
    if out is not None:
        out.index_fill_(0, (student_chunk < 0).nonzero()[:, 0], 0)
    for first in range(0, chunks, CHUNKS):
        last = min(first + CHUNKS, chunks)
        part, here = slice(first, last), [(chunk >= first) & (chunk < last) for _, chunk in sides]
        A, B = (
            rows_of._means(logits, i, torch.where(h, chunk - first, -1), last - first, *found, temperature, log=True)
            for (logits, chunk), i, h, found in zip(sides, ids, here, statistics, strict=True)
        )
        means = A, B, paired[part], students, teachers, topk, reverse
        common[part], l1[part], agree[part] = reference.compare(*means)
        if out is None:
            continue
        D = reference.slopes(*(w[part] for w in weights), *means, counts[0][part])
        members = here[0].nonzero()[:, 0]
        launch(
            "gold_kl", row_gradient, lambda meta, members=members: (len(members),), out.shape[1],
            student=student, out=out, members=members, chunk=sides[0][1], first=first, slopes=D, totals=D.sum(1),
            row_max=statistics[0][0], row_scale=statistics[0][1], stride=student.stride(0), out_stride=out.stride(0),
            width=out.shape[1], inverse=1 / temperature, scale=LOG2E / temperature,
        )  # fmt: skip
    return common, l1, agree


def _statistics(logits: Tensor, chunk: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """max z and 1 / Σ exp((z - max) / τ) of the rows in a chunk, [N] each."""
    row_max, row_scale = logits.new_empty(2, len(logits), dtype=torch.float32)
    launch(
        rows_of.OP, teacher_statistics, lambda meta: (len(logits),), logits.shape[1],
        logits=logits, chunk=chunk, columns=None, inside=None, row_max=row_max, row_scale=row_scale, outside_mass=None,
        stride=logits.stride(0), size=logits.shape[1], scale=LOG2E / temperature,
    )  # fmt: skip
    return row_max, row_scale
