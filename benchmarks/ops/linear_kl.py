"""KL per row between two heads' softmaxes, against two [N, V] products and log_softmax.

With r > 0 the first logits carry a rank-r change, and the gradients for its factors are part of the result. `gemm` is the
products alone: two of depth D and, with r > 0, three of rank r.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.cases import DTYPES as _DTYPES
from benchmarks.cases import Case, Provider, generator, products
from chassis_kernels import Delta, linear_kl

DTYPES = tuple(_DTYPES)
CHUNK = 64
SHAPES = {
    "tiny": [{"N": 70, "D": 16, "V": 130}, {"N": 70, "D": 16, "V": 130, "r": 3}],
    "quick": [{"N": 256, "D": 256, "V": 4000}],
    "default": [{"N": 512, "V": 32000} | other for other in ({"D": 768}, {"D": 2048}, {"D": 768, "r": 32})],
    "scaling": [{"N": n, "D": 256, "V": 8000} for n in (64, 128, 256, 512)]
    + [{"N": 128, "D": 256, "V": v} for v in (4000, 16000, 32000)],
    "gpu": [{"N": n, "D": 4096, "V": 128256} for n in (1024, 8192)],
}


def case(N: int, D: int, V: int, dtype: str, r: int = 0) -> Case:
    """Both models have width D; the factors of the change are float32."""
    kind = _DTYPES[dtype]

    def make(device):
        normal = generator(device)
        heads = 2 * normal(N, D), normal(V, D) * D**-0.5, 2 * normal(N, D), normal(V, D) * D**-0.5
        factors = (0.3 * normal(N, r), 0.3 * normal(r, V), 0.1 * normal(V)) if r else ()
        return *(t.to(kind) for t in heads), *factors

    def eager(h_a, W_a, h_b, W_b, *factors):
        a = h_a @ W_a.T
        if factors:
            u, v, c = factors
            a = a + (u @ v + c).to(a.dtype)
        log_b = (h_b @ W_b.T).log_softmax(1)
        return F.kl_div(a.log_softmax(1), log_b, log_target=True, reduction="none").sum(1)

    def chunked(h_a, W_a, h_b, W_b, *factors):
        u, shared = (factors[0], factors[1:]) if factors else (h_a, ())
        parts = zip(*(t.split(CHUNK) for t in (h_a, h_b, u)), strict=True)
        return torch.cat([eager(a, W_a, b, W_b, *((part, *shared) if factors else ())) for a, b, part in parts])

    def gemm(h_a, W_a, h_b, W_b, *factors):
        logits = h_a @ W_a.T, h_b @ W_b.T
        if not factors:
            return logits
        u, v, _ = factors
        change = u @ v
        return *logits, change @ v.T, u.T @ change  # as if it were the gradient

    def chassis(h_a, W_a, h_b, W_b, *factors):
        return linear_kl(h_a, W_a, h_b, W_b, delta=Delta(*factors) if factors else None)

    def result(function, heads, factors):
        if not factors:
            return (function(*heads),)
        leaves = [t.detach().requires_grad_() for t in factors]
        kl = function(*heads, *leaves)
        return kl.detach(), *torch.autograd.grad(kl.mean(), leaves)

    def provider(function, compile_it=False, **options):
        def prepare(*inputs):
            run = torch.compile(function, dynamic=False) if compile_it else function
            return lambda: result(run, inputs[:4], inputs[4:])

        return Provider(prepare, **options)

    change = 6 * N * r * V  # u v, and a product for either factor's gradient
    return Case(
        "linear_kl",
        {"N": N, "D": D, "V": V, "r": r},
        dtype,
        make,
        lambda *inputs: result(chunked, inputs[:4], inputs[4:]),
        {
            "eager": provider(eager),
            "chassis": provider(chassis, op="linear_kl"),
            "gemm": products(gemm),
            "chunked": provider(chunked),
            "compile": provider(eager, compile_it=True),
        },
        flops=4 * N * D * V + change,  # two products
        bytes=kind.itemsize * 2 * (N + V) * D + 4 * N + 8 * r * (N + V),  # hidden states, heads and factors once
    )
