"""What the estimators share: scikit-learn's conventions, without needing scikit-learn.

Torch tensors are used as they are (device and float dtype respected) and give tensors back; numpy arrays, lists and data
frames give numpy arrays back. Only methods that scikit-learn itself calls import it.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Estimator:
    """Parameters are the arguments of `__init__`; what was fitted ends in an underscore."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> Estimator:
        """Change parameters; raises ValueError for an unknown name."""
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                raise ValueError(f"Invalid parameter {name!r} for estimator {self}: expected one of {sorted(known)}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.get_params().items())})"

    def _rows(self, X: Any, *, reset: bool) -> Tensor:
        """X as a float tensor [N, D]; `reset` takes over D and the column names, else they must agree."""
        names = _column_names(X)
        X = as_tensor(X, "X")
        if X.dim() != 2:
            raise ValueError(
                f"Expected 2D array, got {X.dim()}D array instead. Reshape your data either using array.reshape(-1, 1) if "
                "it has a single feature or array.reshape(1, -1) if it contains a single sample."
            )
        for count, what in ((len(X), "sample(s)"), (X.shape[1], "feature(s)")):
            if count == 0:
                raise ValueError(f"Found array with 0 {what} (shape={tuple(X.shape)}) while a minimum of 1 is required.")
        if reset:
            self.n_features_in_ = X.shape[1]
            self.__dict__.pop("feature_names_in_", None)
            if names is not None:
                self.feature_names_in_ = names
        elif X.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {X.shape[1]} features, but {type(self).__name__} is expecting {self.n_features_in_} features "
                "as input"
            )
        elif names is not None and not np.array_equal(names, getattr(self, "feature_names_in_", names)):
            raise ValueError(_name_difference(list(names), list(self.feature_names_in_)))
        return X

    def _check_fitted(self) -> None:
        if not self.__sklearn_is_fitted__():
            from sklearn.exceptions import NotFittedError

            raise NotFittedError(f"This {type(self).__name__} instance is not fitted yet: call fit or partial_fit first")


def as_tensor(values: Any, name: str) -> Tensor:
    """A float tensor on the device of `values`; raises ValueError or TypeError for what is not finite real numbers."""
    if isinstance(values, Tensor):
        if values.is_complex():
            raise ValueError("Complex data not supported")
        values = values.detach()
        return values if values.is_floating_point() else values.double()
    if hasattr(values, "tocsr"):
        raise TypeError(f"Sparse data was passed for {name}, but dense data is required: use .toarray()")
    array = np.asarray(values)
    if array.dtype.kind == "c":
        raise ValueError(f"Complex data not supported: {name} is {array.dtype}")
    if array.dtype not in (np.float16, np.float32, np.float64):
        array = array.astype(np.float64)
    return torch.from_numpy(array if array.flags.writeable and all(s >= 0 for s in array.strides) else array.copy())


def like(result: Tensor, given: Any) -> Any:
    """The result as the kind of thing that was given: a tensor, else a numpy array."""
    return result if isinstance(given, Tensor) else result.numpy()


def _column_names(X: Any) -> np.ndarray | None:
    columns = getattr(X, "columns", None)
    names = None if columns is None else np.asarray(columns, dtype=object)
    return names if names is not None and all(isinstance(name, str) for name in names) else None


def _name_difference(given: list[str], fitted: list[str]) -> str:
    unseen, missing = (sorted(set(a) - set(b)) for a, b in ((given, fitted), (fitted, given)))
    parts = ["The feature names should match those that were passed during fit."]
    if unseen:
        parts.append("Feature names unseen at fit time:\n" + "".join(f"- {name}\n" for name in unseen))
    if missing:
        parts.append("Feature names seen at fit time, yet now missing:\n" + "".join(f"- {name}\n" for name in missing))
    if not unseen and not missing:
        parts.append("Feature names must be in the same order as they were in fit.\n")
    return "\n".join(parts)
