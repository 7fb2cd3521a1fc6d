"""logits[:, cols] += hidden U V in place, against clone + index_add_ and the in-place ways to write it."""

from __future__ import annotations

import torch

from benchmarks.cases import DTYPES as _DTYPES
from benchmarks.cases import Case, compiled, generator, simple
from chassis_kernels import delta_logits_

DTYPES = tuple(_DTYPES)
_BAR = {"D": 2048, "r": 128, "K": 2048, "V": 32000}
_SMALL = {"D": 256, "r": 16, "K": 256, "V": 4000}
SHAPES = {
    "tiny": [{"N": n, "D": 24, "r": 4, "K": 16, "V": 50} for n in (1, 9)],
    "quick": [{"N": n} | _SMALL for n in (1, 64)],
    "default": [{"N": n} | _BAR for n in (1, 16, 64, 2048)],
    "scaling": [{"N": 256, "D": 2048, "r": 128, "K": k, "V": v} for k, v in ((8192, 32000), (2048, 128256))],
    "gpu": [{"N": n, "D": 4096, "r": 128, "K": 8192, "V": 128256} for n in (1, 64, 2048, 8192)],
}


def case(N: int, D: int, r: int, K: int, V: int, dtype: str) -> Case:
    """N rows, rank r, K of V columns."""
    kind = _DTYPES[dtype]

    def make(device):
        normal = generator(device)
        logits, hidden, down, up = normal(N, V), normal(N, D), normal(D, r) * D**-0.5, normal(r, K) * r**-0.5
        columns = torch.randperm(V, generator=torch.Generator().manual_seed(0))[:K].sort().values
        return *(t.to(kind) for t in (logits, hidden, down, up)), columns.to(device)

    def chassis(logits, hidden, U, W, cols):
        return delta_logits_(logits, hidden, U, W, cols=cols)

    def clone(logits, hidden, U, W, cols):
        return logits.clone().index_add_(1, cols, hidden @ U @ W)

    def in_place(logits, hidden, U, W, cols):
        return logits.index_add_(1, cols, hidden @ U @ W)

    def indexed(logits, hidden, U, W, cols):
        logits[:, cols] += hidden @ U @ W
        return logits

    return Case(
        "delta_logits",
        {"N": N, "D": D, "r": r, "K": K, "V": V},
        dtype,
        make,
        lambda *inputs: (clone(*inputs),),
        {
            "eager": simple(clone),
            "chassis": simple(chassis, op="delta_logits_"),
            "eager_in_place": simple(in_place),
            "eager_indexed": simple(indexed),
            "compile": compiled(clone),
        },
        flops=2 * N * r * (D + K),  # the two thin products
        bytes=kind.itemsize * (N * D + r * (D + K) + 2 * N * K) + 8 * K,  # inputs once; named columns read and written
    )
