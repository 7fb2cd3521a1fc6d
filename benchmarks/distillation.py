"""What the cases of the distillation losses share: logits, an alignment, a projection, and steps that make a gradient.

A case's inputs are (student [1, T, V_s], teacher [1, T, V_t], ids, weights, student chunks, teacher chunks); a loss takes
(student, teacher, SparseProjection, Chunks) and gives a scalar. A step gives the loss and the gradient for the student.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Provider, generator
from chassis_kernels import Chunks, SparseProjection
from chassis_kernels.chunks import layout

PARTS = 8


def inputs(T: int, V_s: int, V_t: int, K: int, dtype: torch.dtype, exact: float = 0.0) -> Callable[[torch.device], tuple]:
    """`make` of a case: logits of standard deviation 2, chunks of one to three tokens on either side, K falling weights a
    student token; a share `exact` of the student's tokens has one partner of weight 1 instead."""

    def make(device):
        normal = generator(device)
        student, teacher = (normal(1, T, width).mul_(2).to(dtype) for width in (V_s, V_t))
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(0, V_t, (V_s, K), generator=g)
        weights = torch.rand(V_s, K, generator=g).sort(1, descending=True).values
        weights /= weights.sum(1, keepdim=True)
        one_to_one = int(exact * V_s)
        ids[:one_to_one, 0] = torch.randperm(V_t, generator=g)[:one_to_one]
        ids[:one_to_one, 1:], weights[:one_to_one, 0] = -1, 1
        sides = [torch.arange(T).repeat_interleave(torch.randint(1, 4, (T,), generator=g))[None, :T] for _ in range(2)]
        slots = int(min(side.max() for side in sides)) + 1
        sides = [torch.where(side < slots, side, -1) for side in sides]
        return student, teacher, *(t.to(device) for t in (ids, weights, *sides))

    return make


def aligned(teacher: Tensor, ids: Tensor, weights: Tensor, students: Tensor, teachers: Tensor) -> tuple:
    """What a loss takes beside the student: (teacher, SparseProjection, Chunks). Views built once, not once per step."""
    valid = torch.ones(1, int(students.max()) + 1, dtype=torch.bool, device=ids.device)
    projection = SparseProjection(ids, weights, teacher.shape[2])
    projection.columns, projection.exact_map()  # noqa: B018
    return teacher, projection, Chunks(students, teachers, valid)


def whole(loss: Callable, *, given: Callable = aligned, compile_it: bool = False, **options) -> Provider:
    """The loss of (student, *given(*rest)) at once, and autograd's gradient. `options` are the provider's."""

    def prepare(student, *rest):
        leaf, others = student.detach().requires_grad_(), given(*rest)
        run = torch.compile(loss, dynamic=False) if compile_it else loss

        def step():
            value = run(leaf, *others)
            return value.detach(), torch.autograd.grad(value, leaf)[0]

        return step

    return Provider(prepare, **options)


def into_buffer(loss: Callable, *, given: Callable = aligned, in_place: bool = False, **options) -> Provider:
    """`loss(..., grad_buffer=...)`, with a buffer made once or with the logits themselves.

    In place, a later call reads what the one before wrote: it takes as long, its values differ.
    """

    def prepare(student, *rest):
        if in_place:
            student = student.clone()
        buffer = student if in_place else torch.zeros_like(student)
        return whole(lambda *each: loss(*each, grad_buffer=buffer), given=given).prepare(student, *rest)

    return Provider(prepare, **options)


def in_parts(loss: Callable, shared: Callable[..., dict], **options) -> Provider:
    """The eager loss over PARTS ranges of chunks, one after the other: a fraction of the memory, a gradient in pieces.

    `shared(student, teacher, projection, chunks)` gives the options that must not depend on the range.
    """

    def prepare(student, *rest):
        teacher, projection, chunks = aligned(*rest)
        parts = list(ranges(chunks))

        def step():
            same = shared(student, teacher, projection, chunks)
            total, gradient = 0.0, torch.zeros_like(student)
            for rows, others, part in parts:
                leaf = student[:, rows].detach().requires_grad_()
                value = loss(leaf, teacher[:, others], projection, part, **same)
                gradient[:, rows.start : rows.stop - 1] = torch.autograd.grad(value, leaf)[0][:, :-1]
                total += value.detach()
            return total, gradient

        return step

    return Provider(prepare, **options)


def pairs(chunks: Chunks) -> Tensor:
    """How many chunks enter the loss."""
    return layout(chunks, None, False, torch.float32).counted.sum()


def ranges(chunks: Chunks):
    """(student positions, teacher positions, Chunks) of every range, from the position that predicts its first token."""
    count = chunks.valid.shape[1]
    size = -(-count // PARTS)
    for first in range(0, count, size):
        last, sides = min(first + size, count), []
        for ids in (chunks.student[0], chunks.teacher[0]):
            inside = ((ids >= first) & (ids < last)).nonzero()[:, 0]
            positions = slice(max(int(inside[0]) - 1, 0), int(inside[-1]) + 1)
            mine = ids[positions]
            sides.append((positions, torch.where((mine >= first) & (mine < last), mine - first, -1)[None]))
        (rows, students), (others, teachers) = sides
        yield rows, others, Chunks(students, teachers, chunks.valid[:, first:last])
