"""The estimators' common ground: rows come in batches, statistics are kept, and what is asked for is solved when asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chassis_kernels import state_file
from chassis_kernels.estimator import Estimator, as_tensor, like
from chassis_kernels.moments import Moments
from chassis_kernels.rows import not_finite
from chassis_kernels.statistics import Rows, Statistics, fold_of

FORMAT = {"format": "chassis.estimator", "version": "1"}


class StreamingEstimator(Estimator):
    """An estimator whose fit is a function of moments. Subclasses give `_solve`, and what they need in the fields below."""

    _needs_y = True
    _full_y = False
    _hold = False  # keep the rows while they are fewer than columns, for a dual form
    nan = "raise"

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None, groups: Any = None) -> StreamingEstimator:
        """Forget what was fitted, fit these rows and solve. Arguments as for `partial_fit`."""
        self.__dict__.pop("_statistics", None)
        self.partial_fit(X, y, sample_weight, groups)._solved()
        return self

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None, groups: Any = None) -> StreamingEstimator:
        """Add rows to the fit; it is solved when it is next used.

        X [N, D] and y [N, T] or [N] are torch tensors (any float dtype and device), numpy arrays or data frames. X may
        also be a DataLoader or an iterator, of batches (X, y[, sample_weight[, groups]]) or, where no y is needed, of X.
        Rows with NaN or infinity raise ValueError and leave the fit as it was before their batch, or with nan="drop" are
        left out.
        """
        if isinstance(X, (torch.utils.data.DataLoader, Iterator)):
            for batch in X:
                self._add(*(batch if isinstance(batch, (tuple, list)) else (batch,)))
            if not self.__sklearn_is_fitted__():
                raise ValueError("the batches are over before the first: there is nothing to fit")
        else:
            self._add(X, y, sample_weight, groups)
        return self

    def merge(self, other: StreamingEstimator) -> StreamingEstimator:
        """Add the rows that `other`, of the same class and widths, has seen."""
        if type(other) is not type(self):
            raise ValueError(f"cannot merge {type(other).__name__} into {type(self).__name__}")
        other._check_fitted()
        if not self.__sklearn_is_fitted__():
            self._statistics = self._empty(other._statistics)
            self._adopt(other._attributes())
        elif self._attributes() != other._attributes():
            raise ValueError(f"cannot merge a fit of {other._attributes()} into one of {self._attributes()}")
        self._statistics.merge(other._statistics)
        self._solution = None
        return self

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> StreamingEstimator:
        """Merge over the ranks of `group`: every rank then has the fit of all rows. Call it once, on every rank.

        A rank may have no rows; where targets are spread over ranks, `group` is those that hold the same columns.
        """
        from torch import distributed

        cuda = distributed.get_backend(group) == "nccl"
        fitted = self.__sklearn_is_fitted__()
        mine = None
        if fitted:
            s = self._statistics
            mine = (s.dim_x, s.dim_y, s.n_folds, self._attributes())
        found: list[Any] = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(found, mine, group=group)
        known = [each for each in found if each is not None]
        if not known:
            raise ValueError("no rank has seen any rows: there is nothing to fit")
        if any(each != known[0] for each in known):
            raise ValueError(f"the ranks fit different problems, (D, T, folds, attributes): {known}")
        if not fitted:
            dim_x, dim_y, n_folds, attributes = known[0]
            device = "cuda" if cuda else "cpu"
            self._statistics = Statistics(dim_x, dim_y, n_folds=n_folds, full_y=self._full_y, device=device)
            self._adopt(attributes)
        self._statistics.all_reduce(group)
        self._solution = None
        return self

    def save(self, path: str | Path) -> None:
        """Write parameters and statistics as safetensors; an interrupted write leaves the file that was there."""
        self._check_fitted()
        s = self._statistics
        shape = {"dim_x": s.dim_x, "dim_y": s.dim_y, "n_folds": s.n_folds, "full_y": s.full_y}
        metadata = {"class": type(self).__name__, "params": json.dumps(self.get_params(), default=_plain)}
        metadata |= {"shape": json.dumps(shape), "attributes": json.dumps(self._attributes())}
        state_file.write(path, s.state_dict(), FORMAT | metadata)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> StreamingEstimator:
        """Read what `save` of this class wrote; going on with `partial_fit` gives the same bits as never having stopped."""
        expected = FORMAT | {"class": cls.__name__}
        state, metadata = state_file.read(path, expected, device, what=f"{cls.__name__}.save")
        estimator = cls(**json.loads(metadata["params"]))
        estimator._statistics = Statistics(**json.loads(metadata["shape"]), hold=True, device=device)
        estimator._statistics.load_state_dict(state)
        estimator._adopt(json.loads(metadata["attributes"]))
        return estimator

    @property
    def moments_(self) -> Moments:
        """The moments of all rows seen."""
        self._check_fitted()
        return self._statistics.moments

    @property
    def n_samples_seen_(self) -> int:
        """Rows seen, those dropped or of weight 0 not counted."""
        return self._statistics.rows

    def _solve(self, everything: Rows | Moments) -> Any:
        raise NotImplementedError

    def _solved(self) -> Any:
        if "_statistics" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} is not fitted yet: call fit or partial_fit first")
        if self._solution is None:
            self._solution = self._solve(self._statistics.part())
        return self._solution

    def _add(self, X: Any, y: Any = None, sample_weight: Any = None, groups: Any = None) -> None:
        if y is None and self._needs_y:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        first = "_statistics" not in self.__dict__
        rows = self._rows(X, reset=first)
        targets, flat = self._targets(y, rows) if self._needs_y else (None, False)
        weight = None
        if sample_weight is not None:
            weight = as_tensor(sample_weight, "sample_weight").to(rows.device)
            weight = weight.expand(len(rows)) if weight.dim() == 0 else weight
            if first and not weight.any():
                raise ValueError("every sample weight is zero: there is nothing to fit")
        n_folds = self._n_folds(groups)
        fold = None if groups is None else fold_of(groups, n_folds)
        if fold is not None and len(fold) != len(rows):
            raise ValueError(f"groups has {len(fold)} entries, expected one for each of {len(rows)} rows")
        if first:
            widths = rows.shape[1], 0 if targets is None else targets.shape[1]
            options = {"n_folds": n_folds, "full_y": self._full_y, "hold": self._hold, "device": rows.device}
            statistics = Statistics(*widths, **options)
        else:
            statistics = self._statistics
            if statistics.n_folds != n_folds:
                raise ValueError("groups must be given with every batch or with none")
        statistics.update(rows, targets, weight, fold, self.nan)
        self._statistics, self._flat, self._solution = statistics, flat, None

    def _targets(self, y: Any, rows: Tensor) -> tuple[Tensor, bool]:
        """y as [N, T], and whether it came as [N]."""
        targets = as_tensor(y, "y").to(rows.device)
        if targets.dim() not in (1, 2) or len(targets) != len(rows):
            raise ValueError(f"y has shape {tuple(targets.shape)}, expected [{len(rows)}, T] or [{len(rows)}]")
        return (targets.unsqueeze(1), True) if targets.dim() == 1 else (targets, False)

    def _n_folds(self, groups: Any) -> int:
        if groups is not None:
            raise ValueError(f"{type(self).__name__} has no use for groups")
        return 1

    def _finite_rows(self, X: Any) -> Tensor:
        """X [N, D] to be predicted or transformed, float32 or float64."""
        self._check_fitted()
        rows = self._rows(X, reset=False)
        if not_finite(rows).any():
            raise ValueError("Input X contains NaN or infinity")
        return rows if rows.dtype == torch.float64 else rows.float()

    def _empty(self, model: Statistics) -> Statistics:
        return Statistics(
            model.dim_x, model.dim_y, n_folds=model.n_folds, full_y=self._full_y, hold=self._hold, device=model.device
        )

    def _attributes(self) -> dict[str, Any]:
        names = getattr(self, "feature_names_in_", None)
        return {
            "n_features_in_": self.n_features_in_,
            "_flat": self._flat,
            "names": None if names is None else names.tolist(),
        }

    def _adopt(self, attributes: dict[str, Any]) -> None:
        self.n_features_in_, self._flat, self._solution = attributes["n_features_in_"], attributes["_flat"], None
        if attributes["names"] is not None:
            self.feature_names_in_ = np.asarray(attributes["names"], dtype=object)

    def __sklearn_is_fitted__(self) -> bool:
        return "_statistics" in self.__dict__


class Transformer(StreamingEstimator):
    """An estimator that maps rows to rows."""

    _needs_y = False

    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """`fit`, then `transform` of the same rows."""
        return self.fit(X, y, sample_weight).transform(X)

    def transform(self, X: Any) -> Any:
        """The rows [N, D] transformed, of the kind of X."""
        return like(self._apply(self._finite_rows(X)), X)

    def _apply(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags

        target = TargetTags(required=self._needs_y, multi_output=True, single_output=True)
        kept = TransformerTags(preserves_dtype=["float64", "float32"])
        return Tags(None, target, transformer_tags=kept, input_tags=InputTags())


class Regressor(StreamingEstimator):
    """An estimator of y [N, T] that is affine in x; `_solved` has W [D, T] and b [T]."""

    def predict(self, X: Any) -> Any:
        """Predictions [N, T], or [N] after a one-dimensional y, of the kind of X."""
        rows, solution = self._finite_rows(X), self._solved()
        predicted = torch.addmm(solution.b.to(rows), rows, solution.W.to(rows))
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

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, RegressorTags, Tags, TargetTags

        target = TargetTags(required=True, multi_output=True, single_output=True)
        return Tags("regressor", target, regressor_tags=RegressorTags(), input_tags=InputTags())


def _plain(value: Any) -> Any:
    """What json does not know: numbers and arrays of numpy and torch."""
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return value.tolist()
    raise TypeError(f"a parameter of type {type(value).__name__} cannot be saved: give numbers, strings or tuples of them")
