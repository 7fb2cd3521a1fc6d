"""Ridge regression that is fitted batch by batch and equals the fit on all rows at once."""

from __future__ import annotations

from typing import Any

import torch

from chassis_kernels import ridge
from chassis_kernels.estimator import Estimator, as_tensor, like
from chassis_kernels.moments import Moments
from chassis_kernels.rows import not_finite


class StreamingRidge(Estimator):
    """Linear least squares with an L2 penalty from streamed moments, in scikit-learn's conventions.

    `alpha` is relative to tr(S)/D with alpha_scale="trace", absolute with "none" (scikit-learn's Ridge). X [N, D] and
    y [N, T] or [N] are torch tensors (any float dtype and device), numpy arrays or data frames. Memory: D·(D+T) float64,
    whatever N. Errors and warnings as for `ridge.solve`; rows with NaN or infinity raise ValueError and leave the fit as
    it was.
    """

    def __init__(self, alpha: float = 1e-3, alpha_scale: str = "trace", fit_intercept: bool = True) -> None:
        self.alpha, self.alpha_scale, self.fit_intercept = alpha, alpha_scale, fit_intercept

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> StreamingRidge:
        """Forget what was fitted, fit these rows and solve."""
        self.__dict__.pop("moments_", None)
        self.partial_fit(X, y, sample_weight)._solved()
        return self

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> StreamingRidge:
        """Add rows to the fit; it is solved when it is next used."""
        if y is None:
            raise ValueError("StreamingRidge requires y to be passed, but the target y is None")
        first = "moments_" not in self.__dict__
        rows = self._rows(X, reset=first)
        targets = as_tensor(y, "y").to(rows.device)
        if len(targets) != len(rows) or targets.dim() > 2:
            raise ValueError(f"y has shape {tuple(targets.shape)}, expected [{len(rows)}, T] or [{len(rows)}]")
        flat = targets.dim() == 1
        targets = targets.unsqueeze(1) if flat else targets
        weight = None
        if sample_weight is not None:
            weight = as_tensor(sample_weight, "sample_weight").to(rows.device)
            weight = weight.expand(len(rows)) if weight.dim() == 0 else weight
            if first and not weight.any():
                raise ValueError("every sample weight is zero: there is nothing to fit")
        moments = Moments(rows.shape[1], targets.shape[1], device=rows.device) if first else self.moments_
        moments.update(rows, targets, weight=weight)
        self.moments_, self._flat, self._solution = moments, flat, None
        return self

    def predict(self, X: Any) -> Any:
        """Predictions [N, T], or [N] after a one-dimensional y, of the kind of X."""
        self._check_fitted()
        rows = self._rows(X, reset=False)
        if not_finite(rows).any():
            raise ValueError("Input X contains NaN or infinity")
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        solution = self._solved()
        predicted = torch.addmm(solution.b.to(dtype), rows.to(dtype), solution.W.to(dtype))
        return like(predicted.squeeze(1) if self._flat else predicted, X)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Coefficient of determination R², averaged over targets; a constant target counts 1 if met exactly, else 0."""
        truth, predicted = as_tensor(y, "y").double().cpu(), as_tensor(self.predict(X), "X").double().cpu()
        weight = torch.ones(len(truth)) if sample_weight is None else as_tensor(sample_weight, "sample_weight").cpu()
        weight = weight.double().reshape(-1, *[1] * (truth.dim() - 1))
        residual = (weight * (truth - predicted).square()).sum(0)
        total = (weight * (truth - (weight * truth).sum(0) / weight.sum()).square()).sum(0)
        return float(torch.where(total > 0, 1 - residual / total, (residual == 0).double()).mean())

    @property
    def coef_(self) -> Any:
        """Coefficients (T, D), or (D,) after a one-dimensional y, float64 numpy array."""
        W = self._solved().W
        return (W[:, 0] if self._flat else W.T).cpu().numpy()

    @property
    def intercept_(self) -> Any:
        """Intercepts (T,), or a number after a one-dimensional y."""
        b = self._solved().b.cpu().numpy()
        return float(b[0]) if self._flat else b

    @property
    def alpha_(self) -> float:
        """The absolute penalty used."""
        return self._solved().alpha

    def _solved(self) -> ridge.RidgeSolution:
        if "moments_" not in self.__dict__:
            raise AttributeError("StreamingRidge is not fitted yet: call fit or partial_fit first")
        if self._solution is None:
            self._solution = ridge.solve(
                self.moments_, self.alpha, alpha_scale=self.alpha_scale, intercept=self.fit_intercept
            )
        return self._solution

    def __sklearn_is_fitted__(self) -> bool:
        return "moments_" in self.__dict__

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, RegressorTags, Tags, TargetTags

        target = TargetTags(required=True, multi_output=True, single_output=True)
        return Tags("regressor", target, regressor_tags=RegressorTags(), input_tags=InputTags())
