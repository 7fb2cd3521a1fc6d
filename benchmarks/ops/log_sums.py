"""log Σ exp [N] of logits [N, V]: `torch.logsumexp`, and log_softmax from which it is read off."""

from __future__ import annotations

import torch

from benchmarks.cases import DTYPES as _DTYPES
from benchmarks.cases import Case, compiled, generator, simple
from chassis_kernels import log_sums

DTYPES = tuple(_DTYPES)
SHAPES = {
    "tiny": [{"N": 20, "V": 150}],
    "quick": [{"N": 512, "V": 8192}],
    "default": [{"N": 2048, "V": 8192}, {"N": 512, "V": 128256}],
    "scaling": [{"N": n, "V": 32000} for n in (1, 16, 256)] + [{"N": 1024, "V": v} for v in (2048, 16384)],
    "gpu": [{"N": 4096, "V": 128256}],
}


def case(N: int, V: int, dtype: str) -> Case:
    """N rows of V logits."""
    kind = _DTYPES[dtype]

    def make(device):
        return (generator(device)(N, V).mul_(3).to(kind),)

    def eager(z):
        return torch.logsumexp(z if z.dtype == torch.float64 else z.float(), 1)

    def read_off(z):
        z = z.float()
        return z[:, 0] - torch.log_softmax(z, 1)[:, 0]

    return Case(
        "log_sums",
        {"N": N, "V": V},
        dtype,
        make,
        lambda z: (eager(z),),
        {
            "eager": simple(eager),
            "log_softmax": simple(read_off),
            "chassis": simple(log_sums, op="log_sums"),
            "compile": compiled(eager),
        },
        flops=10 * N * V,
        bytes=kind.itemsize * N * V,
    )
