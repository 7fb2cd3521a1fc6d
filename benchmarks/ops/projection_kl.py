"""projection_kl, loss and gradient: a fresh gradient tensor, a reused one and in place, against eager PyTorch.

`eager` is the loss as published eager code writes it: every row is projected, then chunks are averaged. `eager_chunks` is
the package's reference: chunks are averaged, then projected. Both pick columns by a stable sort: `topk` breaks bfloat16
ties at random, and the gradients would differ by whole columns.
"""

from __future__ import annotations

import torch

from benchmarks.cases import DTYPES as _DTYPES
from benchmarks.cases import Case
from benchmarks.distillation import in_parts, inputs, into_buffer, pairs, whole
from chassis_kernels import projection_kl
from chassis_kernels.chunks import chunk_means, layout
from chassis_kernels.reference import projection_kl as reference

DTYPES = tuple(_DTYPES)
_REST = {"K": 4, "k": 8192}
_SMALL = {"K": 4, "k": 2048}
SHAPES = {
    "tiny": [{"T": 24, "V_s": 60, "V_t": 80, "K": 3, "k": 40}],
    "quick": [{"T": 128, "V_s": 4000, "V_t": 6000, "K": 4, "k": 1024}],
    "default": [{"T": t, "V_s": s, "V_t": v} | _REST for t, s, v in ((512, 32000, 51200), (256, 128256, 151936))],
    "scaling": [{"T": t, "V_s": 16000, "V_t": 16000} | _SMALL for t in (32, 64, 128, 256)]
    + [{"T": 64, "V_s": v, "V_t": v} | _SMALL for v in (8000, 32000, 64000)],
    "gpu": [{"T": t, "V_s": 128256, "V_t": 151936} | _REST for t in (1024, 2048, 8192)],
}


def project_rows(student, teacher, projection, chunks, *, k):
    """The loss as published eager code writes it, of [1, T, V] logits."""
    plan = layout(chunks, None, False, torch.float32)
    columns = reference.top_columns(teacher[0], None, k)
    edges = projection.slice(columns)
    places, size = torch.stack([edges.positions, edges.rows]), (len(columns), student.shape[2])
    matrix = torch.sparse_coo_tensor(places, edges.weights, size, check_invariants=False)
    p = torch.softmax(student[0].float(), 1)
    a = chunk_means(torch.sparse.mm(matrix, p.T).T, plan.student, plan.student_count)
    Q = chunk_means(torch.log_softmax(teacher[0][:, columns].float(), 1), plan.teacher, plan.teacher_count)
    log_r = (a / (a.sum(1, keepdim=True) + 1e-10) + 1e-10).log()
    return torch.where(plan.paired, (Q.exp() * (Q - log_r)).sum(1), 0.0).sum() / plan.paired.sum()


def case(T: int, V_s: int, V_t: int, K: int, k: int, dtype: str) -> Case:
    """T positions on either side, K entries a student token, k teacher columns."""
    kind = _DTYPES[dtype]

    def rows(*given):
        return project_rows(*given, k=k)

    def chunk_first(*given, **options):
        return reference.loss(*given, vocab_topk=k, **options)[0]

    def chassis(*given, **options):
        return projection_kl(*given, vocab_topk=k, **options)[0]

    def shared(student, teacher, projection, chunks):
        return {"columns": reference.top_columns(teacher[0], None, k), "denominator": pairs(chunks)}

    return Case(
        "projection_kl",
        {"T": T, "V_s": V_s, "V_t": V_t, "K": K, "k": k},
        dtype,
        inputs(T, V_s, V_t, K, kind),
        lambda *given: whole(chunk_first).prepare(*given)(),
        {
            "eager": whole(rows),
            "eager_chunks": whole(chunk_first),
            "chassis": whole(chassis, op="projection_kl_"),
            "chassis_reused": into_buffer(chassis, op="projection_kl_"),
            "chassis_in_place": into_buffer(chassis, in_place=True, op="projection_kl_"),
            "chunked": in_parts(chunk_first, shared),
            "compile": whole(rows, compile_it=True),
        },
        flops=10 * T * V_s,  # running maximum, exponential, sum, gradient
        bytes=kind.itemsize * (2 * T * V_s + T * V_t),  # logits read once, gradient written once
    )
