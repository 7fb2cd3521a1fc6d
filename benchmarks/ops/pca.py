"""The k leading principal components of N rows: `StreamingPCA` at once and in batches, against one eigendecomposition.

Components are compared as the projection onto them, formed after the clock has stopped.
"""

from __future__ import annotations

import torch

from benchmarks.cases import Case, Provider, compiled, generator, simple
from chassis_kernels import StreamingPCA

DTYPES = ("fp32",)
BATCHES = 16
SHAPES = {
    "tiny": [{"N": 160, "D": 12, "k": 3}],
    "quick": [{"N": 8192, "D": 128, "k": 16}],
    "default": [{"N": 16384, "D": 256, "k": 32}],
    "scaling": [{"N": 16384, "D": d, "k": 32} for d in (512, 1024)] + [{"N": 65536, "D": 256, "k": 32}],
    "gpu": [{"N": 1 << 18, "D": 1024, "k": 64}],
}


def case(N: int, D: int, k: int, dtype: str) -> Case:
    """Variances that fall as a power of the axis, apart from a step behind the k that are asked for."""

    def make(device):
        normal = generator(device)
        axis = torch.arange(1, D + 1, device=device)
        basis, _ = torch.linalg.qr(normal(D, D))
        return ((normal(N, D) * axis**-0.5 * torch.where(axis <= k, 2.0, 1.0)) @ basis + 3,)

    def covariance(x):
        x = x - x.mean(0)
        values, vectors = torch.linalg.eigh(x.T @ x / (len(x) - 1))
        return vectors[:, -k:], values[-k:].flip(0)

    def projection(found, x):
        vectors, values = found
        return vectors.double() @ vectors.double().T, values

    def read(fitted, x):
        components = torch.as_tensor(fitted.components_).double()
        return components.T @ components, torch.as_tensor(fitted.explained_variance_)

    def streamed(x):
        pca = StreamingPCA(k)
        for part in x.chunk(BATCHES):
            pca.partial_fit(part)
        assert pca.n_components_ == k  # solved when it is asked for
        return pca

    return Case(
        "pca",
        {"N": N, "D": D, "k": k},
        dtype,
        make,
        lambda x: projection(covariance(x), x),
        {
            "eager": simple(covariance, read=projection),
            "chassis": simple(lambda x: StreamingPCA(k).fit(x), read=read, op="moments_update_"),
            "chassis_batches": Provider(lambda x: lambda: streamed(x), read=read, op="moments_update_"),
            "compile": compiled(covariance, read=projection),
        },
        flops=N * D * (D + 1) + 9 * D**3,
        bytes=4 * (N * D + D * k),
    )
