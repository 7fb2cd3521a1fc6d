"""Ridge regression whose coefficients have a given rank (Izenman 1975; Mukherjee & Zhu 2011).

    W = (S + αI)⁻¹ C        W_k = W B Bᵀ,  B the k leading right singular vectors of (S + αI)^(-1/2) C

W_k has the smallest penalised squared error of all matrices of rank k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from chassis_kernels.moments import Moments
from chassis_kernels.ridge_path import Eigenbasis
from chassis_kernels.solvers import signs, thin_svd
from chassis_kernels.statistics import Rows
from chassis_kernels.streaming import Regressor


@dataclass(eq=False)
class _Factors:
    U: Tensor  # [D, k]
    V: Tensor  # [k, T]
    b: Tensor  # [T]
    singular_values: Tensor  # [min(D, T)]

    @property
    def W(self) -> Tensor:
        return self.U @ self.V


class ReducedRankRegression(Regressor):
    """`StreamingRidge` with coefficients of rank `rank` at most (None: no limit), kept as their two factors."""

    _hold = True

    def __init__(
        self,
        rank: int | None = None,
        alpha: float = 1e-3,
        alpha_scale: str = "trace",
        fit_intercept: bool = True,
        nan: str = "raise",
    ) -> None:
        self.rank, self.alpha, self.alpha_scale, self.fit_intercept, self.nan = rank, alpha, alpha_scale, fit_intercept, nan

    @property
    def x_factors_(self) -> Any:
        """(D, k); coef_ is (x_factors_ @ y_factors_).T."""
        return self._solved().U.cpu().numpy()

    @property
    def y_factors_(self) -> Any:
        """(k, T), orthonormal rows."""
        return self._solved().V.cpu().numpy()

    @property
    def singular_values_(self) -> Any:
        """All singular values of (S + αI)^(-1/2) C: the squares of those cut off are what the error grows by."""
        return self._solved().singular_values.cpu().numpy()

    def _solve(self, everything: Rows | Moments) -> _Factors:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank}: expected None or at least 1")
        basis = Eigenbasis.of(everything, self.fit_intercept, [self.alpha], self.alpha_scale)
        scale = basis.spectrum.scale(float(basis.penalties))[0][:, None]
        _, values, B = thin_svd(scale.sqrt() * basis.R)
        B = B[:, : self.rank]
        B = B * signs(B)
        U = basis.spectrum.vectors @ (scale * (basis.R @ B))
        return _Factors(U, B.T, basis.mean_y - (basis.mean_x @ U) @ B.T, values)
