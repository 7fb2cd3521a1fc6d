"""Ridge regression that chooses its penalty: by documents held out, or by generalised cross-validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chassis_kernels.moments import Moments
from chassis_kernels.ridge_path import Eigenbasis, basis_of, largest_of_the_best
from chassis_kernels.statistics import Rows, Statistics
from chassis_kernels.streaming import Regressor

ALPHAS = tuple(10.0**k for k in range(-8, 3))


@dataclass(eq=False)
class _Solution:
    W: Tensor  # [D, T]
    b: Tensor  # [T]
    alpha: Tensor  # [] or [T], absolute
    best: Tensor  # [] or [T], index into the alphas
    errors: Tensor  # [A], mean over the targets, or [A, T]
    dof: Tensor  # [A]


class StreamingRidgeCV(Regressor):
    """`StreamingRidge` with the best of `alphas`, one for all targets or with alpha_per_target one for each.

    Rows with `groups` (the document of each row) are cross-validated by group in `n_folds` folds, without a second pass;
    rows without are judged by generalised cross-validation, which costs one decomposition for all alphas and targets.
    Equal errors: the larger alpha. alpha_scale="trace" makes an alpha relative to tr(S)/D of the rows it is fitted on.

    `cv_results_`: "alphas" [A], "mean_squared_error" [A], with alpha_per_target [A, T], and "degrees_of_freedom" [A] on all
    rows, numpy.
    Memory: n_folds · D·(D+T) float64 with groups, else D·(D+T). Warnings and errors as for `ridge.solve`.
    """

    _hold = True

    def __init__(
        self,
        alphas: Sequence[float] = ALPHAS,
        alpha_scale: str = "trace",
        fit_intercept: bool = True,
        alpha_per_target: bool = False,
        n_folds: int = 5,
        nan: str = "raise",
    ) -> None:
        self.alphas, self.alpha_scale, self.fit_intercept = alphas, alpha_scale, fit_intercept
        self.alpha_per_target, self.n_folds, self.nan = alpha_per_target, n_folds, nan

    @property
    def alpha_(self) -> Any:
        """The alpha chosen, out of `alphas`: a number, or (T,) with alpha_per_target."""
        return self._shown(torch.as_tensor(self.alphas, dtype=torch.float64)[self._solved().best.cpu()])

    @property
    def penalty_(self) -> Any:
        """The absolute penalty used on all rows, like `alpha_`."""
        return self._shown(self._solved().alpha)

    @property
    def best_score_(self) -> Any:
        """The mean squared error of the alpha chosen, averaged over targets, or (T,) with alpha_per_target."""
        solution = self._solved()
        if self.alpha_per_target:
            return solution.errors.gather(0, solution.best[None])[0].cpu().numpy()
        return float(solution.errors[solution.best])

    @property
    def cv_results_(self) -> dict[str, Any]:
        """The error of every alpha."""
        solution = self._solved()
        found = {
            "alphas": torch.as_tensor(self.alphas, dtype=torch.float64),
            "mean_squared_error": solution.errors,
            "degrees_of_freedom": solution.dof,
        }
        return {name: values.cpu().numpy() for name, values in found.items()}

    def all_reduce(
        self,
        group: torch.distributed.ProcessGroup | None = None,
        *,
        targets: torch.distributed.ProcessGroup | None = None,
    ) -> StreamingRidgeCV:
        """As for every estimator; `targets` is the group of ranks that hold the other columns of y of the same rows.

        With it one alpha is chosen for the targets of all of them; the fit is solved at once, on every rank together.
        """
        super().all_reduce(group)
        if targets is not None:
            self._solution = self._solve(self._statistics.part(), targets)
        return self

    def _n_folds(self, groups: Any) -> int:
        if groups is None:
            return 1
        if self.n_folds < 2:
            raise ValueError(f"n_folds={self.n_folds}: expected at least 2")
        return int(self.n_folds)

    def _solve(self, everything: Rows | Moments, targets: torch.distributed.ProcessGroup | None = None) -> _Solution:
        if len(self.alphas) == 0:
            raise ValueError("alphas is empty: give at least one")
        whole = basis_of(everything, self.fit_intercept, self.alphas, self.alpha_scale)
        if self._statistics.n_folds == 1:
            errors = whole.gcv(self.alpha_per_target)
        else:
            errors = self._held_out(self._statistics, everything) / whole.count
        alphas = torch.as_tensor(self.alphas, dtype=torch.float64, device=errors.device)
        judged, variance = errors, whole.q / whole.count
        if not self.alpha_per_target:
            judged, variance = errors[:, 0], variance.sum()
            errors = judged / len(whole.q)
            if targets is not None:
                both = torch.cat([judged, variance[None]])
                torch.distributed.all_reduce(both, group=targets)
                judged, variance = both[:-1], both[-1]
        best = largest_of_the_best(alphas, judged, variance)
        W, b, used = whole.coefficients(best)
        return _Solution(W, b, used, best, errors, whole.degrees_of_freedom())

    def _held_out(self, statistics: Statistics, everything: Rows | Moments) -> Tensor:
        parts = [statistics.part(fold) for fold in range(statistics.n_folds)]
        filled = [fold for fold, part in enumerate(parts) if float(part.count) > 0]
        if len(filled) < 2:
            raise ValueError(
                f"the groups fall into {len(filled)} of {statistics.n_folds} folds: give more groups, or none of them for "
                "generalised cross-validation"
            )
        total = 0
        for fold in filled:
            fitted = Eigenbasis.of(statistics.without(fold, everything), self.fit_intercept, self.alphas, self.alpha_scale)
            total = total + fitted.held_out(parts[fold], self.alpha_per_target)
        return total

    def _shown(self, values: Tensor) -> Any:
        return values.cpu().numpy() if values.dim() else float(values)
