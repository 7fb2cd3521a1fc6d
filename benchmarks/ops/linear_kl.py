"""KL per row between two heads' softmaxes, forward, against two [N, V] products and log_softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.cases import DTYPES as _DTYPES
from benchmarks.cases import Case, compiled, generator, simple
from chassis_kernels import linear_kl

DTYPES = tuple(_DTYPES)
CHUNK = 64
SHAPES = {
    "tiny": [{"N": 70, "D": 16, "V": 130}],
    "quick": [{"N": 256, "D": 256, "V": 4000}],
    "default": [{"N": 512, "D": 768, "V": 32000}, {"N": 512, "D": 2048, "V": 32000}],
    "full": [{"N": n, "D": 768, "V": 32000} for n in (128, 2048)] + [{"N": 512, "D": 768, "V": v} for v in (8192, 128256)],
    "gpu": [{"N": n, "D": 4096, "V": 128256} for n in (1024, 8192)],
}


def case(N: int, D: int, V: int, dtype: str) -> Case:
    """Both models have width D."""
    kind = _DTYPES[dtype]

    def make(device):
        normal = generator(device)
        tensors = 2 * normal(N, D), normal(V, D) * D**-0.5, 2 * normal(N, D), normal(V, D) * D**-0.5
        return tuple(t.to(kind) for t in tensors)

    def eager(h_a, W_a, h_b, W_b):
        log_a, log_b = (h_a @ W_a.T).log_softmax(1), (h_b @ W_b.T).log_softmax(1)
        return F.kl_div(log_a, log_b, log_target=True, reduction="none").sum(1)

    def chunked(h_a, W_a, h_b, W_b):
        return torch.cat([eager(a, W_a, b, W_b) for a, b in zip(h_a.split(CHUNK), h_b.split(CHUNK), strict=True)])

    return Case(
        "linear_kl",
        {"N": N, "D": D, "V": V},
        dtype,
        make,
        lambda *inputs: (chunked(*inputs),),
        {
            "eager": simple(eager),
            "chassis": simple(linear_kl, op="linear_kl"),
            "chunked": simple(chunked),
            "compile": compiled(eager),
        },
        flops=4 * N * D * V,  # two products
        bytes=kind.itemsize * 2 * (N + V) * D + 4 * N,  # hidden states and heads once
    )
