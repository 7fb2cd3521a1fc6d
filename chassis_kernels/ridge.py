"""Ridge regression from streamed moments (Hoerl & Kennard 1970).

    W = (S + αI)⁻¹ C        b = m_y − m_x W

One α: Cholesky in float64. Several: one eigendecomposition S = V s Vᵀ, then W = V (VᵀC / (s + α)) for each. Fewer rows
than columns, with X in memory: the dual W = Xᵀ (XXᵀ + αI)⁻¹ Y. S is positive semi-definite but for rounding, so negative
eigenvalues count as 0; α = 0 asks for the least squares solution of minimal norm.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from chassis_kernels.moments import Moments
from chassis_kernels.rows import not_finite

FLOOR = 10 * torch.finfo(torch.float64).eps  # times the largest eigenvalue: no smaller α changes S + αI reliably


@dataclass(eq=False)
class RidgeSolution:
    """W [D, T] and b [T] in float64 for the absolute penalty `alpha`: predictions are x @ W + b."""

    W: Tensor
    b: Tensor
    alpha: float
    _shifted: Tensor | None = field(default=None, repr=False)  # S + alpha I
    _eigenvalues: Tensor | None = field(default=None, repr=False)

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of S, ascending, [D]; costs an eigendecomposition when a single α was solved."""
        if self._eigenvalues is not None:
            return self._eigenvalues
        return _on_device_or_cpu(torch.linalg.eigvalsh, self._shifted) - self.alpha

    @property
    def condition(self) -> float:
        """Condition number of S: the largest eigenvalue over the smallest absolute one."""
        return _condition(self.eigenvalues)

    @property
    def dof(self) -> float:
        """Effective degrees of freedom, Σ s/(s+α), between 0 and D; the intercept is not counted."""
        return _degrees_of_freedom(self.eigenvalues, self.alpha)

    @property
    def negative_eigenvalues(self) -> int:
        """How many eigenvalues of S rounding has made negative; 0 for well-conditioned data."""
        return int((self.eigenvalues < 0).sum())


def solve(
    moments: Moments, alpha: float = 1e-3, *, alpha_scale: str = "trace", intercept: bool = True
) -> RidgeSolution:
    """Ridge for one penalty: `alpha * tr(S)/D` with alpha_scale="trace" (free of units), `alpha` itself with "none".

    An α above 0 but below 10 eps λ_max is raised to that, with a RuntimeWarning naming cond(S), the effective degrees of
    freedom and the negative eigenvalues; so is it warned when rounding left eigenvalues below -α. α = 0 gives the least
    squares solution of minimal norm, with the same warning if S is singular. Raises ValueError for moments without rows
    or without y, and for an α that is negative or not finite.
    """
    S, C = _normal_equations(moments, intercept)
    (absolute,) = _absolute([alpha], alpha_scale, S)
    W, used, shifted, eigenvalues = _solve(S, C, absolute)
    return RidgeSolution(W, _bias(moments, W, intercept), used, shifted, eigenvalues)


def solve_path(
    moments: Moments, alphas: Iterable[float], *, alpha_scale: str = "trace", intercept: bool = True
) -> Iterator[RidgeSolution]:
    """Solutions for several penalties, in their order, from one eigendecomposition; otherwise as `solve`."""
    S, C = _normal_equations(moments, intercept)
    absolutes = _absolute(alphas, alpha_scale, S)
    eigenvalues, vectors = _on_device_or_cpu(torch.linalg.eigh, S)
    projected = vectors.T @ C

    def solutions() -> Iterator[RidgeSolution]:
        for absolute in absolutes:
            W, used = _from_spectrum(eigenvalues, vectors, projected, absolute)
            yield RidgeSolution(W, _bias(moments, W, intercept), used, None, eigenvalues)

    return solutions()


def fit_ridge(
    X: Tensor,  # [N, D]
    Y: Tensor,  # [N, T] or [N]
    lam: float,
    *,
    alpha_scale: str = "none",
) -> tuple[Tensor, Tensor]:
    """Ridge with an unpenalised intercept for data in memory: W [D, T] and b [1, T], predictions X @ W + b.

    Any float dtypes; the result is float64 if X or Y is, else float32, on their device. The penalty is `lam` on
    Σ(x-m)ᵀ(x-m), or relative to its trace with alpha_scale="trace". With N < D the dual form is solved, N x N. Warnings
    and errors as for `solve`; rows with NaN or infinity raise ValueError.
    """
    Y = Y.unsqueeze(1) if Y.dim() == 1 else Y
    if X.dim() != 2 or Y.dim() != 2 or len(X) != len(Y) or X.shape[1] == 0 or Y.shape[1] == 0:
        raise ValueError(f"X {tuple(X.shape)}, Y {tuple(Y.shape)}: expected [N, D] and [N, T] with the same N, D and T > 0")
    dtype = torch.float64 if torch.float64 in (X.dtype, Y.dtype) else torch.float32
    if len(X) >= X.shape[1]:
        solution = solve(Moments(X.shape[1], Y.shape[1], device=X.device).update(X, Y), lam, alpha_scale=alpha_scale)
        return solution.W.to(dtype), solution.b.to(dtype).unsqueeze(0)
    if len(X) == 0:
        raise ValueError("no rows to fit: N = 0")
    if not_finite(X).any() or not_finite(Y).any():
        raise ValueError("X or Y holds NaN or infinity: leave those rows out")
    x, y = X.detach().double(), Y.detach().double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    K = x @ x.T
    (absolute,) = _absolute([lam], alpha_scale, K, width=X.shape[1])
    W = x.T @ _solve(K, y, absolute)[0]
    return W.to(dtype), (mean_y - mean_x @ W).to(dtype).unsqueeze(0)


def _normal_equations(moments: Moments, intercept: bool) -> tuple[Tensor, Tensor]:
    if moments.rows == 0:
        raise ValueError("these moments have seen no rows: update them before solving")
    if moments.dim_y == 0:
        raise ValueError("these moments have no y (dim_y=0): there is nothing to regress on")
    S, C = moments.S, moments.C
    if not intercept:
        S.addr_(moments.mean_x, moments.mean_x, alpha=float(moments.count))
        C = C.addr(moments.mean_x, moments.mean_y, alpha=float(moments.count))
    if not (S.sum() + C.sum()).isfinite():
        raise ValueError("the moments hold NaN or infinity: rows were merged unchecked; start over with Moments.update")
    return S, C


def _bias(moments: Moments, W: Tensor, intercept: bool) -> Tensor:
    return moments.mean_y - moments.mean_x @ W if intercept else torch.zeros_like(moments.mean_y)


def _absolute(alphas: Iterable[float], alpha_scale: str, gram: Tensor, width: int | None = None) -> list[float]:
    if alpha_scale not in ("trace", "none"):
        raise ValueError(f'alpha_scale={alpha_scale!r}: expected "trace" or "none"')
    alphas = [float(alpha) for alpha in alphas]
    for alpha in alphas:
        if not (alpha >= 0 and math.isfinite(alpha)):
            raise ValueError(f"alpha={alpha}: expected a finite number that is not negative")
    unit = float(gram.trace()) / (width or len(gram)) if alpha_scale == "trace" else 1.0
    return [alpha * unit for alpha in alphas]


def _solve(S: Tensor, C: Tensor, alpha: float) -> tuple[Tensor, float, Tensor | None, Tensor | None]:
    """(S + αI)⁻¹ C, the α used, and S + αI or the eigenvalues, whichever is known."""
    bound = min(float(S.trace()), float(S.abs().sum(0).max()))  # of the largest eigenvalue
    if alpha > FLOOR * bound:
        shifted = S.clone()
        shifted.diagonal().add_(alpha)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            return torch.cholesky_solve(C, factor), alpha, shifted, None
    eigenvalues, vectors = _on_device_or_cpu(torch.linalg.eigh, S)
    W, used = _from_spectrum(eigenvalues, vectors, vectors.T @ C, alpha)
    return W, used, None, eigenvalues


def _from_spectrum(eigenvalues: Tensor, vectors: Tensor, projected: Tensor, alpha: float) -> tuple[Tensor, float]:
    largest, lowest = float(eigenvalues[-1].clamp_min(0)), float(eigenvalues[0])
    floor = FLOOR * largest
    used = alpha if alpha == 0 or alpha >= floor else floor
    positive = eigenvalues.clamp_min(0)
    cutoff = max(10, len(eigenvalues)) * torch.finfo(torch.float64).eps * largest if alpha == 0 else 0.0
    kept = (positive + used) > cutoff
    if used != alpha or alpha < -lowest or not (kept.all() or largest == 0):
        what = f"raised to the floor {floor:.3g} (10 eps λ_max)" if used != alpha else "smaller than the rounding error of S"
        if alpha == 0:
            what = f"0 and S has rank {int(kept.sum())}: the solution of minimal norm is returned"
        warnings.warn(
            f"ridge: alpha {alpha:.3g} is {what}; cond(S) {_condition(eigenvalues):.3g}, effective degrees of freedom "
            f"{_degrees_of_freedom(eigenvalues, used):.1f} of {len(eigenvalues)}, {int((eigenvalues < 0).sum())} negative "
            "eigenvalues. A larger alpha gives a reliable answer.",
            RuntimeWarning,
            stacklevel=4,
        )
    scale = torch.where(kept, 1 / (positive + used), 0.0)
    return vectors @ (scale[:, None] * projected), used


def _condition(eigenvalues: Tensor) -> float:
    smallest = float(eigenvalues.abs().min())
    return float(eigenvalues[-1]) / smallest if smallest > 0 else math.inf


def _degrees_of_freedom(eigenvalues: Tensor, alpha: float) -> float:
    positive = eigenvalues[eigenvalues > 0]
    return float((positive / (positive + alpha)).sum())


def _on_device_or_cpu(decompose, matrix: Tensor):
    """Some devices' eigensolvers fail on matrices that LAPACK takes."""
    try:
        return decompose(matrix)
    except (torch.linalg.LinAlgError, NotImplementedError, RuntimeError):
        if matrix.device.type == "cpu":
            raise
        result = decompose(matrix.cpu())
        return result.to(matrix.device) if isinstance(result, Tensor) else tuple(t.to(matrix.device) for t in result)
