"""projection_kl, loss and gradient: a fresh gradient tensor and a reused one, against eager PyTorch.

`eager` is the loss as published eager code writes it: every row is projected, then chunks are averaged. `eager_chunks` is
the package's reference: chunks are averaged, then projected. Both pick columns by a stable sort: `topk` breaks bfloat16
ties at random, and the gradients would differ by whole columns.
"""

from __future__ import annotations

import torch

from benchmarks.cases import DTYPES as _DTYPES
from benchmarks.cases import Case, Provider, generator
from chassis_kernels import Chunks, SparseProjection, projection_kl
from chassis_kernels.chunks import chunk_means, layout
from chassis_kernels.reference import projection_kl as reference

DTYPES = tuple(_DTYPES)
SHAPES = {
    "tiny": [{"T": 24, "V_s": 60, "V_t": 80, "K": 3, "k": 40}],
    "quick": [{"T": 128, "V_s": 4000, "V_t": 6000, "K": 4, "k": 1024}],
    "default": [
        {"T": 512, "V_s": 32000, "V_t": 51200, "K": 4, "k": 8192},
        {"T": 256, "V_s": 128256, "V_t": 151936, "K": 4, "k": 8192},
    ],
    "full": [{"T": t, "V_s": 32000, "V_t": 51200, "K": 4, "k": 8192} for t in (128, 1024)]
    + [{"T": 512, "V_s": v, "V_t": v, "K": 4, "k": 8192} for v in (16000, 64000)],
    "gpu": [{"T": t, "V_s": 128256, "V_t": 151936, "K": 4, "k": 8192} for t in (1024, 2048, 8192)],
}


def case(T: int, V_s: int, V_t: int, K: int, k: int, dtype: str) -> Case:
    """T positions on either side, K entries a student token, k teacher columns."""
    kind = _DTYPES[dtype]

    def make(device):
        normal = generator(device)
        student, teacher = (normal(1, T, width).mul_(2).to(kind) for width in (V_s, V_t))
        return student, teacher, *(t.to(device) for t in _alignment(T, V_s, V_t, K))

    def inputs_of(teacher, ids, weights, students, teachers):
        valid = torch.ones(1, int(students.max()) + 1, dtype=torch.bool, device=ids.device)
        return teacher, SparseProjection(ids, weights, V_t), Chunks(students, teachers, valid)

    def gradient_of(loss_of, compile_it=False):
        def prepare(student, *rest):
            given, leaf = inputs_of(*rest), student.detach().requires_grad_()
            given[1].columns  # noqa: B018 - built once per projection, not once per step
            run = torch.compile(loss_of, dynamic=False) if compile_it else loss_of

            def step():
                loss = run(leaf, *given)
                return loss.detach(), torch.autograd.grad(loss, leaf)[0]

            return step

        return prepare

    def rows(student, teacher, projection, chunks):
        plan = layout(chunks, None, False, torch.float32)
        columns = torch.sort(teacher[0].amax(0), descending=True, stable=True).indices[:k].sort().values
        edges = projection.slice(columns)
        places, size = torch.stack([edges.positions, edges.rows]), (len(columns), V_s)
        matrix = torch.sparse_coo_tensor(places, edges.weights, size, check_invariants=False)
        p = torch.softmax(student[0].float(), 1)
        a = chunk_means(torch.sparse.mm(matrix, p.T).T, plan.student, plan.student_count)
        Q = chunk_means(torch.log_softmax(teacher[0][:, columns].float(), 1), plan.teacher, plan.teacher_count)
        log_r = (a / (a.sum(1, keepdim=True) + 1e-10) + 1e-10).log()
        return torch.where(plan.paired, (Q.exp() * (Q - log_r)).sum(1), 0.0).sum() / plan.paired.sum()

    def chunk_first(*given):
        return reference.loss(*given, vocab_topk=k)[0]

    def fresh(*given):
        return projection_kl(*given, vocab_topk=k)[0]

    def reused(student, *rest):
        buffer = torch.zeros_like(student)
        return gradient_of(lambda *given: projection_kl(*given, vocab_topk=k, grad_buffer=buffer)[0])(student, *rest)

    return Case(
        "projection_kl",
        {"T": T, "V_s": V_s, "V_t": V_t, "K": K, "k": k},
        dtype,
        make,
        lambda *inputs: gradient_of(chunk_first)(*inputs)(),
        {
            "eager": Provider(gradient_of(rows)),
            "eager_chunks": Provider(gradient_of(chunk_first)),
            "chassis": Provider(gradient_of(fresh), op="projection_kl"),
            "chassis_reused": Provider(reused, op="projection_kl_"),
            "compile": Provider(gradient_of(rows, compile_it=True)),
        },
        flops=10 * T * V_s,  # running maximum, exponential, sum, gradient
        bytes=kind.itemsize * (2 * T * V_s + T * V_t),  # logits read once, gradient written once
    )


def _alignment(T: int, V_s: int, V_t: int, K: int) -> tuple[torch.Tensor, ...]:
    """Ids and falling weights of a projection [V_s, K]; chunks of one to three tokens on either side."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V_t, (V_s, K), generator=g)
    weights = torch.rand(V_s, K, generator=g).sort(1, descending=True).values
    sides = [torch.arange(T).repeat_interleave(torch.randint(1, 4, (T,), generator=g))[None, :T] for _ in range(2)]
    slots = int(min(side.max() for side in sides)) + 1
    sides = [torch.where(side < slots, side, -1) for side in sides]
    return ids, weights / weights.sum(1, keepdim=True), *sides
