"""token_kl, loss and gradient, against eager PyTorch: a teacher with the student's tokenizer.

k teacher columns, or all of them at k = V. Eager picks columns by a stable sort, as `topk` breaks bfloat16 ties at random.
"""

from __future__ import annotations

import torch

from benchmarks.cases import DTYPES as _DTYPES
from benchmarks.cases import Case, Provider, generator
from benchmarks.distillation import PARTS, into_buffer, whole
from chassis_kernels import token_kl
from chassis_kernels.reference import token_kl as reference

DTYPES = tuple(_DTYPES)
SHAPES = {
    "tiny": [{"T": 24, "V": 60, "k": k} for k in (20, 60)],
    "quick": [{"T": 128, "V": 4000, "k": k} for k in (1024, 4000)],
    "default": [{"T": t, "V": v, "k": k} for t, v, k in ((512, 32000, 8192), (256, 128256, 8192), (512, 32000, 32000))],
    "scaling": [{"T": t, "V": 16000, "k": 2048} for t in (64, 128, 256, 512)]
    + [{"T": 128, "V": v, "k": 2048} for v in (8000, 32000, 64000)],
    "gpu": [{"T": t, "V": 128256, "k": k} for t, k in ((2048, 8192), (8192, 8192), (2048, 128256))],
}


def case(T: int, V: int, k: int, dtype: str) -> Case:
    """T positions; k = V compares all tokens, without a choice of columns."""
    kind = _DTYPES[dtype]
    topk = None if k == V else k

    def make(device):
        normal = generator(device)
        return tuple(normal(1, T, V).mul_(2).to(kind) for _ in range(2))

    def mask(student):
        return torch.ones(student.shape[:2], device=student.device)

    def eager(student, teacher):
        return reference.loss(student, teacher, mask(student), vocab_topk=topk, n_tokens=float(T))

    def chassis(student, teacher, **options):
        return token_kl(student, teacher, mask(student), vocab_topk=topk, n_tokens=float(T), **options)

    def others(teacher):
        return (teacher,)

    def chunked(student, teacher):
        def run():
            columns = None if topk is None else reference.top_columns(teacher[0], None, topk)
            total, gradient = 0.0, torch.empty_like(student[0])
            for rows, others, out in zip(*(t.chunk(PARTS) for t in (student[0], teacher[0], gradient)), strict=True):
                leaf = rows.detach().requires_grad_()
                value = reference.token_kl(leaf, others, columns, None, 1.0, False).sum() / T
                out.copy_(torch.autograd.grad(value, leaf)[0])
                total += value.detach()
            return total, gradient[None]

        return run

    return Case(
        "token_kl",
        {"T": T, "V": V, "k": k},
        dtype,
        make,
        lambda *given: whole(eager, given=others).prepare(*given)(),
        {
            "eager": whole(eager, given=others),
            "chassis": whole(chassis, given=others, op="token_kl_"),
            "chassis_reused": into_buffer(chassis, given=others, op="token_kl_"),
            "chunked": Provider(chunked),
            "compile": whole(eager, given=others, compile_it=True),
        },
        flops=10 * T * k,  # running maxima, exponentials, sums, gradient
        bytes=kind.itemsize * T * (2 * V + k),  # all of the teacher and k columns of the student read, the gradient written
    )
