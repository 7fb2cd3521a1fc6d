"""Least-squares concept erasure (Belrose et al. 2023, LEACE) from moments of rows x and of the concept z.

    r(x) = x − S^(1/2) P S^(-1/2) (x − m),    P the projection onto the columns of S^(-1/2) C

No linear model predicts z from r(x) better than a constant, and no other affine map with that property changes x less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chassis_kernels.moments import Moments
from chassis_kernels.solvers import Spectrum, thin_svd
from chassis_kernels.streaming import Transformer

NEGLIGIBLE = 1e-6  # of the largest correlation: below it is the rounding of float32 rows


@dataclass(eq=False)
class _Eraser:
    mean: Tensor  # [D]
    left: Tensor  # [D, k]
    right: Tensor  # [D, k]


class ConceptErasure(Transformer):
    """Removes from rows what a linear model could tell of a concept y: numbers [N] or [N, T], or with n_classes class ids.

    `transform` changes rows as little as possible in the mean square. Memory: D·(D+T) float64.
    """

    _needs_y = True

    def __init__(self, n_classes: int | None = None, nan: str = "raise") -> None:
        self.n_classes, self.nan = n_classes, nan

    @property
    def rank_(self) -> int:
        """How many dimensions were erased."""
        return self._solved().left.shape[1]

    @property
    def projection_(self) -> Any:
        """S^(1/2) P S^(-1/2), (D, D): what is taken from x − mean_, as a map of column vectors."""
        eraser = self._solved()
        return (eraser.left @ eraser.right.T).cpu().numpy()

    @property
    def mean_(self) -> Any:
        """Mean (D,)."""
        return self._solved().mean.cpu().numpy()

    def _targets(self, y: Any, rows: Tensor) -> tuple[Tensor, bool]:
        targets, flat = super()._targets(y, rows)
        if self.n_classes is None:
            return targets, flat
        ids = targets[:, 0].long()
        known = (targets[:, 0] == ids) & (ids >= 0) & (ids < self.n_classes)
        if not flat or not known.all():
            raise ValueError(f"y {tuple(targets.shape)}: expected one class id per row, from 0 to {self.n_classes - 1}")
        return torch.nn.functional.one_hot(ids, self.n_classes).to(torch.float32), flat

    def _solve(self, moments: Moments) -> _Eraser:
        spectrum = Spectrum.of(moments.S)
        inverse, _ = spectrum.inverse_roots()
        root = torch.where(inverse > 0, 1 / inverse, 0.0)
        U, values, _ = thin_svd(inverse[:, None] * (spectrum.vectors.T @ moments.C))
        U = U[:, values > NEGLIGIBLE * values[:1]]
        left, right = (spectrum.vectors @ (scale[:, None] * U) for scale in (root, inverse))
        return _Eraser(moments.mean_x, left, right)

    def _apply(self, rows: Tensor) -> Tensor:
        eraser = self._solved()
        return rows - ((rows - eraser.mean.to(rows)) @ eraser.right.to(rows)) @ eraser.left.T.to(rows)
