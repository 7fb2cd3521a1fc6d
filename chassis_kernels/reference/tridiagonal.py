"""Ridge for many penalties in the basis where S is tridiagonal, in eager PyTorch: S = Q T Qᵀ.

R = Qᵀ C        w = (T + α)⁻¹ r        W = Q w        Q = Π (I − V F Vᵀ), a block of reflectors V [B, D] with F [B, B] each
"""

from __future__ import annotations

import torch
from torch import Tensor


def tridiagonal_reduce_(S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """T's diagonal [D] and off-diagonal [D - 1], and τ [D - 1] of the reflectors I − τ v vᵀ, whose product is Q.

    v_i is left in row i of S [D, D] behind the diagonal, where its first entry is 1; all else of S is 0.
    """
    diagonal, off, scales = S.new_empty(len(S)), S.new_empty(len(S) - 1), S.new_empty(len(S) - 1)
    rest = S.clone()
    for i in range(len(S)):
        diagonal[i], S[i] = rest[0, 0], 0
        x = rest[0, 1:].clone()
        if len(x) == 0:
            break
        size = x[1:].square().sum()
        off[i], scales[i] = x[0], 0.0
        if size > 0:
            off[i] = -torch.copysign((x[0].square() + size).sqrt(), x[0])
            scales[i] = (off[i] - x[0]) / off[i]
            x = x / (x[0] - off[i])
        x[0] = 1
        S[i, i + 1 :] = x
        H = torch.eye(len(x), dtype=S.dtype, device=S.device) - scales[i] * torch.outer(x, x)
        rest = H @ rest[1:, 1:] @ H
    return diagonal, off, scales


def tridiagonal_path(
    reflectors: Tensor,  # [P, D]
    factors: Tensor,  # [P, B]
    diagonal: Tensor,  # [D]
    off: Tensor,  # [D - 1]
    C: Tensor,  # [D, T]
    alphas: Tensor,  # [A]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """R [D, T]; r·w and w·w of every α and column, [A, T]; tr (T + α)⁻¹, [A]."""
    R = _orthogonal(reflectors, factors).T @ C
    identity = torch.eye(len(R), dtype=R.dtype, device=R.device)
    sums = [R.new_empty(len(alphas), R.shape[1]), R.new_empty(len(alphas), R.shape[1]), R.new_empty(len(alphas))]
    for a, alpha in enumerate(alphas):
        w = _solve(diagonal, off, R, alpha)
        sums[0][a], sums[1][a] = (R * w).sum(0), w.square().sum(0)
        sums[2][a] = _solve(diagonal, off, identity, alpha).trace()
    return R, *sums


def tridiagonal_solve(
    reflectors: Tensor,  # [P, D]
    factors: Tensor,  # [P, B]
    diagonal: Tensor,  # [D]
    off: Tensor,  # [D - 1]
    R: Tensor,  # [D, T]
    alphas: Tensor,  # [T]
) -> Tensor:
    """W [D, T], each column for its own α."""
    W = torch.empty_like(R)
    for alpha in alphas.unique():
        chosen = alphas == alpha
        W[:, chosen] = _solve(diagonal, off, R[:, chosen], alpha)
    return _orthogonal(reflectors, factors) @ W


def _orthogonal(reflectors: Tensor, factors: Tensor) -> Tensor:
    size = reflectors.shape[1]
    Q = torch.eye(size, dtype=reflectors.dtype, device=reflectors.device)
    step = factors.shape[1]
    for V, F in zip(reflectors.split(step), factors.split(step), strict=True):
        Q = Q - (Q @ V.T) @ F @ V
    return Q


def _solve(diagonal: Tensor, off: Tensor, R: Tensor, alpha: Tensor) -> Tensor:
    return torch.linalg.solve(torch.diag(diagonal + alpha) + torch.diag(off, 1) + torch.diag(off, -1), R)
