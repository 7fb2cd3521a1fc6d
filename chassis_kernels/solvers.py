"""What the closed forms share: float64 decompositions of moments, and how much of a spectrum can be trusted.

    S = V diag(s) Vᵀ        fewer rows than columns, S = xᵀx:  xxᵀ = U diag(s) Uᵀ,  V = xᵀ U s^(-1/2)

S is positive semi-definite but for rounding, so negative eigenvalues count as 0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
FLOOR = 10 * EPS  # times the largest eigenvalue: no smaller α changes S + αI reliably


@dataclass(eq=False)
class Spectrum:
    """Eigenvalues `values` [r], ascending, and eigenvectors `vectors` [D, r] of S [D, D]; those left out are 0."""

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, S: Tensor) -> Spectrum:
        """Of a symmetric matrix [D, D]."""
        return cls(*decompose(torch.linalg.eigh, S))

    @classmethod
    def of_rows(cls, x: Tensor) -> Spectrum:
        """Of xᵀx for few rows x [N, D], from xxᵀ; directions below its rounding error are left out."""
        values, U = decompose(torch.linalg.eigh, x @ x.T)
        kept = values > _rounding(values, x.shape[0])
        values, U = values[kept], U[:, kept]
        return cls(values, (x.T @ U) / values.sqrt())

    @property
    def all_values(self) -> Tensor:
        """[D], ascending."""
        missing = self.vectors.shape[0] - len(self.values)
        return torch.cat([self.values, self.values.new_zeros(missing)]).sort().values if missing else self.values

    def scales(self, alphas: Tensor) -> tuple[Tensor, Tensor]:
        """1/(s + α) [A, r] and the α used [A]: 0, or at least FLOOR times the largest eigenvalue.

        α = 0 inverts S where it is not singular.
        """
        used = torch.where(alphas > 0, alphas.clamp_min(FLOOR * _largest(self.values)), 0.0)
        shifted = self.values.clamp_min(0) + used[:, None]
        least = torch.where(alphas > 0, 0.0, _rounding(self.values, len(self.values)))
        return torch.where(shifted > least[:, None], 1 / shifted, 0.0), used

    def scale(self, alpha: float) -> tuple[Tensor, float]:
        """`scales` for one α, with a RuntimeWarning when the α asked for is too small to be reliable."""
        values = self.values
        scales, used = self.scales(values.new_tensor([alpha]))
        scale, used = scales[0], float(used)
        lost = used > 0 and alpha < -float(values.min()) if len(values) else False
        singular = alpha == 0 and (len(values) < len(self.vectors) or not scale.all()) and _largest(values) > 0
        if used == alpha and not lost and not singular:
            return scale, used
        what = "smaller than the rounding error of S"
        if used != alpha:
            what = f"raised to the floor {used:.3g} (10 eps λ_max)"
        elif alpha == 0:
            what = f"0 and S has rank {int((scale > 0).sum())}: the solution of minimal norm is returned"
        warnings.warn(
            f"ridge: alpha {alpha:.3g} is {what}; cond(S) {condition(self.all_values):.3g}, effective degrees of freedom "
            f"{degrees_of_freedom(values, used):.1f} of {len(self.vectors)}, {int((values < 0).sum())} negative "
            "eigenvalues. A larger alpha gives a reliable answer.",
            RuntimeWarning,
            stacklevel=4,
        )
        return scale, used

    def inverse_roots(self, alpha: float = 0.0) -> tuple[Tensor, Tensor]:
        """(s + α)^(-1/2) [r], 0 where that is rounding error, and where it is not, bool [r]."""
        shifted = self.values.clamp_min(0) + alpha
        kept = shifted > _rounding(self.values, len(self.values))
        return torch.where(kept, shifted.rsqrt(), 0.0), kept


def condition(values: Tensor) -> float:
    """The largest eigenvalue over the smallest absolute one."""
    smallest = float(values.abs().min())
    return float(values[-1]) / smallest if smallest > 0 else math.inf


def degrees_of_freedom(values: Tensor, alpha: float) -> float:
    """Σ s/(s+α) over the positive eigenvalues."""
    positive = values[values > 0]
    return float((positive / (positive + alpha)).sum())


def relative_alpha(alpha: float, alpha_scale: str, unit: Tensor | float) -> float:
    """`alpha` times `unit`, tr(S)/D, with alpha_scale="trace"; raises ValueError for what is no penalty."""
    if alpha_scale not in ("trace", "none"):
        raise ValueError(f'alpha_scale={alpha_scale!r}: expected "trace" or "none"')
    alpha = float(alpha)
    if not (alpha >= 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha={alpha}: expected a finite number that is not negative")
    return alpha * float(unit) if alpha_scale == "trace" else alpha


def decompose(function: Callable, matrix: Tensor):
    """`function(matrix)`, on the CPU with a warning where the device's solver fails: some do on matrices LAPACK takes."""
    try:
        return function(matrix)
    except (torch.linalg.LinAlgError, NotImplementedError, RuntimeError) as error:
        if matrix.device.type == "cpu":
            raise
        name = getattr(function, "__name__", "the decomposition")
        reason = str(error).partition("\n")[0]
        warnings.warn(f"{name} failed on {matrix.device} ({reason}): done on the CPU instead", RuntimeWarning, stacklevel=3)
        result = function(matrix.cpu())
        return result.to(matrix.device) if isinstance(result, Tensor) else tuple(t.to(matrix.device) for t in result)


def ensure_finite(S: Tensor, C: Tensor) -> None:
    """Raises ValueError for moments that NaN or infinity got into."""
    if not (S.sum() + C.sum()).isfinite():
        raise ValueError("the moments hold NaN or infinity: rows were merged unchecked; start over with Moments.update")


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, k], singular values [k] descending and V [n, k], k = min(m, n)."""

    def svd(matrix: Tensor):
        return tuple(torch.linalg.svd(matrix, full_matrices=False))

    U, values, Vh = decompose(svd, matrix)
    return U, values, Vh.T


def signs(columns: Tensor) -> Tensor:
    """[k]: ±1 that makes the largest entry of every column of [D, k] positive."""
    largest = columns.gather(0, columns.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(columns)


def _largest(values: Tensor) -> float:
    return float(values[-1].clamp_min(0)) if len(values) else 0.0


def rounding(largest: float, size: int) -> float:
    """The rounding error of eigenvalues of a matrix [size, size], from the largest of them."""
    return max(10, size) * EPS * largest


def _rounding(values: Tensor, size: int) -> float:
    return rounding(_largest(values), size)
