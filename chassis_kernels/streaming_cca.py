"""Canonical correlations from moments (Hotelling 1936).

    A = S_x^(-1/2)    B = S_y^(-1/2)    A C B = U diag(ρ) Zᵀ        rotations A U and B Z

With alpha > 0 S_x + α_x I and S_y + α_y I take the places of S_x and S_y, α relative to tr(S)/D of each side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from chassis_kernels.estimator import as_tensor, like
from chassis_kernels.moments import Moments
from chassis_kernels.solvers import Spectrum, relative_alpha, signs, thin_svd
from chassis_kernels.streaming import Transformer


@dataclass(eq=False)
class _Pairs:
    x: Tensor  # [D, k]
    y: Tensor  # [T, k]
    correlations: Tensor  # [k], descending
    mean_x: Tensor
    mean_y: Tensor


class StreamingCCA(Transformer):
    """Canonical correlation analysis of pairs of rows x [N, D] and y [N, T] that come in batches.

    `n_components` at most, None for all there are: the smaller rank of the two. `transform` gives canonical variates of
    unit variance on the rows fitted. With fewer rows than columns every correlation is 1 unless `alpha` is above 0.
    Memory: D² + DT + T² float64.
    """

    _needs_y = True
    _full_y = True

    def __init__(self, n_components: int | None = None, alpha: float = 0.0, nan: str = "raise") -> None:
        self.n_components, self.alpha, self.nan = n_components, alpha, nan

    def transform(self, X: Any, y: Any = None) -> Any:
        """The variates [N, k] of X or, with y, of both, each of the kind it came as."""
        scores = super().transform(X)
        if y is None:
            return scores
        targets, _ = self._targets(y, as_tensor(X, "X"))
        pairs = self._solved()
        targets = targets if targets.dtype == pairs.y.dtype else targets.float()
        return scores, like((targets - pairs.mean_y.to(targets)) @ pairs.y.to(targets), y)

    @property
    def canonical_correlations_(self) -> Any:
        """Correlations (k,), falling."""
        return self._solved().correlations.cpu().numpy()

    @property
    def x_rotations_(self) -> Any:
        """(D, k): the variates of x are (x − x_mean_) @ x_rotations_."""
        return self._solved().x.cpu().numpy()

    @property
    def y_rotations_(self) -> Any:
        """(T, k)."""
        return self._solved().y.cpu().numpy()

    @property
    def x_mean_(self) -> Any:
        """(D,)."""
        return self._solved().mean_x.cpu().numpy()

    @property
    def y_mean_(self) -> Any:
        """(T,)."""
        return self._solved().mean_y.cpu().numpy()

    def _solve(self, moments: Moments) -> _Pairs:
        if self.n_components is not None and self.n_components < 1:
            raise ValueError(f"n_components={self.n_components}: expected None or at least 1")
        if moments.rows < 2:
            raise ValueError(f"n_samples={moments.rows}: a correlation needs at least 2 rows")
        whiten_x, whiten_y = (self._whitening(matrix) for matrix in (moments.S, moments.Q))
        U, correlations, Z = thin_svd(whiten_x.T @ moments.C @ whiten_y)
        k = min(len(correlations), self.n_components or len(correlations))
        x, y = whiten_x @ U[:, :k], whiten_y @ Z[:, :k]
        unit = signs(x) * max(float(moments.count) - 1, 1.0) ** 0.5
        return _Pairs(x * unit, y * unit, correlations[:k].clamp_max(1), moments.mean_x, moments.mean_y)

    def _whitening(self, matrix: Tensor) -> Tensor:
        spectrum = Spectrum.of(matrix)
        penalty = relative_alpha(self.alpha, "trace", matrix.trace() / len(matrix))
        inverse, kept = spectrum.inverse_roots(penalty)
        if not kept.any():
            raise ValueError("X or y is constant: it correlates with nothing")
        return (spectrum.vectors * inverse)[:, kept]

    def _apply(self, rows: Tensor) -> Tensor:
        pairs = self._solved()
        return (rows - pairs.mean_x.to(rows)) @ pairs.x.to(rows)
