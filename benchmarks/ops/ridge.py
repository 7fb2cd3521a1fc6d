"""Ridge with an intercept from rows X to targets H, alone and through an unembedding W_U [V, D].

With V > 0 the targets are H W_Uᵀ. The eager formulation materialises them, [N, V], and solves for all V columns;
`fit_ridge(X, (H, W_U))` gives the same coefficients as two factors, which is how a lens applies them. Their product is
formed after the clock has stopped. alpha = 0 is least squares.
"""

from __future__ import annotations

import torch

from benchmarks.cases import Case, compiled, generator, simple
from chassis_kernels import fit_ridge

DTYPES = ("fp32",)
ALPHA = 10.0
SHAPES = {
    "tiny": [{"N": 60, "D": 8, "V": 0}, {"N": 60, "D": 8, "V": 30}, {"N": 60, "D": 8, "V": 0, "alpha": 0}],
    "quick": [{"N": 2048, "D": 256, "V": v} for v in (0, 2000)],
    "default": [
        {"N": 4096, "D": 1024, "V": 0},
        {"N": 4096, "D": 768, "V": 16000},
        {"N": 4096, "D": 1024, "V": 0, "alpha": 0},
    ],
    "scaling": [{"N": 4096, "D": 2048, "V": 32000}, {"N": 16384, "D": 1024, "V": 0}],
    "gpu": [{"N": 1 << 16, "D": 2048, "V": v} for v in (0, 32000)],
}


def case(N: int, D: int, V: int, dtype: str, alpha: float = ALPHA) -> Case:
    """V = 0: the targets are H [N, D] themselves."""

    def make(device):
        normal = generator(device)
        x = normal(N, D)
        h = x @ (normal(D, D) * D**-0.5) + normal(N, D)
        return x, h, normal(V, D) * D**-0.5 if V else None

    def solve(x, h, head):
        targets = h @ head.T if V else h
        x, targets = x - x.mean(0), targets - targets.mean(0)
        gram = x.T @ x + alpha * torch.eye(D, dtype=x.dtype, device=x.device)
        return torch.cholesky_solve(x.T @ targets, torch.linalg.cholesky(gram))

    def chassis(x, h, head):
        return fit_ridge(x, (h, head) if V else h, alpha)[0]

    def through(W, x, h, head):
        return (W.hidden.double() @ W.unembedding.double().T if V else W,)

    return Case(
        "ridge",
        {"N": N, "D": D, "V": V} | ({} if alpha == ALPHA else {"alpha": alpha}),
        dtype,
        make,
        lambda *inputs: (solve(*inputs),),
        {
            "eager": simple(solve),
            "chassis": simple(chassis, read=through, op="moments_update_"),
            "compile": compiled(solve),
        },
        flops=N * D * (D + 1) + 2 * N * D * D + D**3 / 3 + 2 * D**3,  # one triangle, XᵀH, Cholesky, two solves
        bytes=4 * (2 * N * D + D * D),  # rows read once, factors written
    )
