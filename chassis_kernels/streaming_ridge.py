"""Ridge regression that is fitted batch by batch and equals the fit on all rows at once."""

from __future__ import annotations

from chassis_kernels import ridge
from chassis_kernels.moments import Moments
from chassis_kernels.statistics import Rows
from chassis_kernels.streaming import Regressor


class StreamingRidge(Regressor):
    """Linear least squares with an L2 penalty from streamed moments, in scikit-learn's conventions.

    `alpha` is relative to tr(S)/D with alpha_scale="trace", absolute with "none" (scikit-learn's Ridge). Memory: D·(D+T)
    float64, whatever N; while N < D the rows alone, solved in dual form. Errors and warnings as for `ridge.solve`.
    """

    _hold = True

    def __init__(
        self, alpha: float = 1e-3, alpha_scale: str = "trace", fit_intercept: bool = True, nan: str = "raise"
    ) -> None:
        self.alpha, self.alpha_scale, self.fit_intercept, self.nan = alpha, alpha_scale, fit_intercept, nan

    @property
    def alpha_(self) -> float:
        """The absolute penalty used."""
        return self._solved().alpha

    def _solve(self, everything: Rows | Moments) -> ridge.RidgeSolution:
        solve = ridge.solve_rows if isinstance(everything, Rows) else ridge.solve
        return solve(everything, self.alpha, alpha_scale=self.alpha_scale, intercept=self.fit_intercept)
