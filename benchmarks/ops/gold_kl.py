"""gold_kl, loss and gradient, against eager PyTorch: half of the student's tokens have an exact partner.

`eager` is the package's reference under autograd: two full log-softmaxes, chunk means, two `topk`.

Tokens of equal probability may take each other's rank, and their gradients with it (bfloat16 logits are full of equals).
What is held against float64 is therefore the gradient summed over each chunk's tokens of equal probability. Where both
sides' probabilities of one rank are equal, the L1 has a kink and its gradient either sign: the teacher is sharper than the
student, so that they cross, and do not run side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import DTYPES as _DTYPES
from benchmarks.cases import Case
from benchmarks.distillation import aligned, in_parts, inputs, into_buffer, pairs, whole
from chassis_kernels import gold_kl
from chassis_kernels.chunks import layout
from chassis_kernels.reference import gold_kl as reference

DTYPES = tuple(_DTYPES)
EXACT = 0.5  # of the student's tokens
SHARPER = 1.5  # the teacher's logits, times the student's
SHAPES = {
    "tiny": [{"T": 24, "V_s": 60, "V_t": 80, "m": 20}],
    "quick": [{"T": 128, "V_s": 4000, "V_t": 6000, "m": 1024}],
    "default": [{"T": t, "V_s": s, "V_t": v, "m": 8192} for t, s, v in ((512, 32000, 51200), (256, 128256, 151936))],
    "scaling": [{"T": t, "V_s": 8000, "V_t": 8000, "m": 1024} for t in (32, 64, 128, 256)]
    + [{"T": 64, "V_s": v, "V_t": v, "m": 1024} for v in (4000, 16000, 32000)],
    "gpu": [{"T": t, "V_s": 128256, "V_t": 151936, "m": 8192} for t in (1024, 2048)],
}


def case(T: int, V_s: int, V_t: int, m: int, dtype: str) -> Case:
    """T positions on either side; the m likeliest of the other tokens are compared by rank."""
    kind = _DTYPES[dtype]

    draw = inputs(T, V_s, V_t, 4, kind, EXACT)

    def make(device):
        student, teacher, *rest = draw(device)
        return student, teacher * SHARPER, *rest

    def eager(*given, **options):
        return reference.loss(*given, uncommon_topk=m, **options)[0]

    def chassis(*given, **options):
        return gold_kl(*given, uncommon_topk=m, **options)[0]

    def shared(student, teacher, projection, chunks):
        return {"denominator": pairs(chunks)}

    return Case(
        "gold_kl",
        {"T": T, "V_s": V_s, "V_t": V_t, "m": m},
        dtype,
        make,
        lambda *given: by_probability(whole(eager).prepare(*given)(), *given),
        {
            "eager": whole(eager, read=by_probability),
            "chassis": whole(chassis, read=by_probability, op="gold_kl_"),
            "chassis_reused": into_buffer(chassis, read=by_probability, op="gold_kl_"),
            "chunked": in_parts(eager, shared, read=by_probability),
            "compile": whole(eager, compile_it=True, read=by_probability),
        },
        flops=10 * T * (V_s + V_t),  # running maxima, exponentials, sums, means, gradient
        bytes=kind.itemsize * (2 * T * V_s + T * V_t),  # logits read once, gradient written once
    )


def by_probability(output: tuple[Tensor, Tensor], student: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient with the tokens without a partner summed where a chunk gives them the same probability."""
    loss, gradient = output
    _, projection, chunks = aligned(*rest)
    chunk_of = layout(chunks, None, False, torch.float32).student
    alone = torch.ones(student.shape[2], dtype=torch.bool, device=student.device)
    alone[projection.exact_map()[0]] = False
    sums = [gradient[0][:, ~alone].double().flatten()]
    for chunk in chunk_of[chunk_of >= 0].unique():
        rows = chunk_of == chunk
        values, group = student[0, rows][:, alone].double().sum(0).unique(return_inverse=True)
        totals = values.new_zeros(len(values), int(rows.sum()))
        sums.append(totals.index_add(0, group, gradient[0, rows][:, alone].T.double()).flatten())
    return loss, torch.cat(sums)
