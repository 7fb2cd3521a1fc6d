"""projection_kl from hidden states and unembedding, with the gradients for both, against the product followed by the loss.

`eager` makes the logits and takes the loss as published eager code writes it; `eager_kernel` makes the logits and hands them
to our projection_kl; `gemm` is their three products alone. With `single`, chunks hold one student token: ours then makes the
logits of those tokens alone that project into the k columns, and prints their share to stderr.
"""

from __future__ import annotations

import functools
import sys

import torch

from benchmarks.cases import DTYPES as _DTYPES
from benchmarks.cases import Case, Provider, generator, products
from benchmarks.distillation import aligned, inputs, pairs, ranges
from benchmarks.ops.projection_kl import project_rows
from chassis_kernels import linear_projection_kl, projection_kl
from chassis_kernels.reference import linear_projection_kl as reference
from chassis_kernels.reference import projection_kl as logits_loss
from chassis_kernels.reference.projection_kl import top_columns

DTYPES = tuple(_DTYPES)
_REST = {"K": 4, "k": 8192}
SHAPES = {
    "tiny": [{"T": 24, "D": 8, "V_s": 60, "V_t": 80, "K": 1, "k": 40, "single": single} for single in (0, 1)],
    "quick": [{"T": 256, "D": 256, "V_s": 4000, "V_t": 6000, "K": 4, "k": 1024, "single": single} for single in (0, 1)],
    "default": [{"T": 512, "D": 2048, "V_s": 32000, "V_t": 51200} | _REST | {"single": single} for single in (0, 1)],
    "scaling": [{"T": t, "D": 256, "V_s": 8000, "V_t": 8000, "K": 4, "k": 1024} for t in (64, 128, 256, 512)]
    + [{"T": 128, "D": 256, "V_s": v, "V_t": v, "K": 4, "k": 1024} for v in (4000, 16000, 32000)],
    "gpu": [{"T": t, "D": 4096, "V_s": 128256, "V_t": 151936} | _REST for t in (1024, 8192)],
}


def case(T: int, D: int, V_s: int, V_t: int, K: int, k: int, dtype: str, single: int = 0) -> Case:
    """T positions on either side, width D, K entries a student token, k teacher columns."""
    kind = _DTYPES[dtype]
    shape = {"T": T, "D": D, "V_s": V_s, "V_t": V_t, "K": K, "k": k, "single": single}
    label = " ".join(f"{name}={value}" for name, value in shape.items())

    def make(device):
        normal = generator(device)
        hidden, weight = 2 * normal(1, T, D), normal(V_s, D) * D**-0.5
        _, *rest, students, teachers = inputs(T, V_s, V_t, K, kind)(device)
        if single:
            students = torch.arange(T, device=device)[None]
            students = torch.where(students <= teachers.max(), students, -1)
        return hidden.to(kind), weight.to(kind), *rest, students, teachers

    def eager(hidden, weight, *given):
        return project_rows(hidden @ weight.T, *given, k=k)

    def kernel(hidden, weight, *given):
        return projection_kl(hidden @ weight.T, *given, vocab_topk=k)[0]

    def chassis(*given):
        loss, stats = linear_projection_kl(*given, vocab_topk=k)
        _say(f"linear_projection_kl {label} {dtype}: the logits of {stats.touched:.1%} of the tokens are made")
        return loss

    def truth(*given):
        return _whole(lambda *each: reference.loss(*each, vocab_topk=k)[0]).prepare(*given)()

    kept = 1 - (1 - k / V_t) ** K if single else 1  # expected share of the tokens that project into the columns
    return Case(
        "linear_projection_kl",
        shape,
        dtype,
        make,
        truth,
        {
            "eager": _whole(eager),
            "eager_kernel": _whole(kernel),
            "chassis": _whole(chassis, op="linear_projection_kl_backward"),
            "gemm": products(_products),
            "chunked": _in_parts(k),
            "compile": _whole(eager, compile_it=True),
        },
        flops=6 * T * V_s * D * kept,  # three products
        bytes=kind.itemsize * (2 * V_s * D + T * V_t),  # the head read and its gradient written once, the teacher's logits
    )


def _products(hidden, weight, *_):
    logits = hidden @ weight.T
    return logits @ weight, logits[0].T @ hidden[0]


def _whole(loss, compile_it: bool = False, **options) -> Provider:
    """The loss, and its gradients for hidden states and head."""

    def prepare(hidden, weight, *rest):
        leaves, given = [t.detach().requires_grad_() for t in (hidden, weight)], aligned(*rest)
        run = torch.compile(loss, dynamic=False) if compile_it else loss

        def step():
            value = run(*leaves, *given)
            return value.detach(), *torch.autograd.grad(value, leaves)

        return step

    return Provider(prepare, **options)


def _in_parts(k: int) -> Provider:
    """The eager loss over ranges of chunks, one after the other."""

    def prepare(hidden, weight, *rest):
        teacher, projection, chunks = aligned(*rest)
        parts, count = list(ranges(chunks)), pairs(chunks)

        def step():
            leaf, gradient, total = weight.detach().requires_grad_(), torch.zeros_like(hidden), 0.0
            same = {"columns": top_columns(teacher[0], None, k), "denominator": count}
            for rows, others, part in parts:
                own = hidden[:, rows].detach().requires_grad_()
                value, _ = logits_loss.loss(own @ leaf.T, teacher[:, others], projection, part, **same)
                value.backward()
                gradient[:, rows.start : rows.stop - 1] = own.grad[:, :-1]
                total += value.detach()
            return total, gradient, leaf.grad

        return step

    return Provider(prepare)


@functools.cache
def _say(line: str) -> None:
    print(line, file=sys.stderr)
