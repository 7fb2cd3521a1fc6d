"""token_kl against eager PyTorch: a teacher with the student's tokenizer, within its 8192 top columns.

    python benchmarks/bench_token_kl.py [--shape small|large] [--dtype fp32|bf16] [--rounds 7] [--json]
"""

import torch
from bench_projection_kl import TOPK, inputs, main

from chassis_kernels.reference import token_kl as reference
from chassis_kernels.token_kl import token_kl


def providers(student: torch.Tensor, *_) -> dict:
    """name -> loss of (student, teacher, ...)."""
    options = {"vocab_topk": TOPK, "n_tokens": float(student.shape[1])}
    mask = torch.ones(student.shape[:2])
    return {
        "reference": lambda student, teacher, *_: reference.loss(student, teacher, mask, **options),
        "chassis_fresh": lambda student, teacher, *_: token_kl(student, teacher, mask, **options),
    }


if __name__ == "__main__":
    main("token_kl", inputs, providers, __doc__)
