"""Principal components from moments: the eigenvectors of S, the same for any split of the rows into batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chassis_kernels.estimator import as_tensor, like
from chassis_kernels.moments import Moments
from chassis_kernels.solvers import Spectrum, signs
from chassis_kernels.statistics import Rows
from chassis_kernels.streaming import Transformer


@dataclass(eq=False)
class _Basis:
    mean: Tensor  # [D]
    components: Tensor  # [D, k]
    values: Tensor  # [k], eigenvalues of S, descending
    total: Tensor  # [], tr(S)
    count: float


class StreamingPCA(Transformer):
    """Exact principal component analysis of rows that come in batches, in scikit-learn's conventions.

    `n_components`: a number, the share of the variance to reach (between 0 and 1) or None for all: D, with fewer rows than
    columns their rank. Signs are fixed: the largest entry of each component is positive. Weights count as repetitions.
    Unlike scikit-learn's IncrementalPCA nothing is approximated. Memory: D² float64, while N < D the rows alone.
    """

    _hold = True

    def __init__(self, n_components: int | float | None = None, whiten: bool = False, nan: str = "raise") -> None:
        self.n_components, self.whiten, self.nan = n_components, whiten, nan

    def inverse_transform(self, X: Any) -> Any:
        """Codes [N, k] back to rows [N, D], of the kind of X."""
        self._check_fitted()
        codes = as_tensor(X, "X")
        codes = codes if codes.dtype == torch.float64 else codes.float()
        basis = self._solved()
        return like(codes @ (basis.components * self._deviations()).T.to(codes) + basis.mean.to(codes), X)

    @property
    def components_(self) -> Any:
        """Principal axes (k, D), by falling variance."""
        return self._solved().components.T.cpu().numpy()

    @property
    def explained_variance_(self) -> Any:
        """Variance along each axis (k,), over n − 1."""
        basis = self._solved()
        return (basis.values / (basis.count - 1)).cpu().numpy()

    @property
    def explained_variance_ratio_(self) -> Any:
        """Share of the variance along each axis (k,)."""
        basis = self._solved()
        return (basis.values / basis.total).nan_to_num(0.0).cpu().numpy()

    @property
    def singular_values_(self) -> Any:
        """Singular values (k,) of the centred rows."""
        return self._solved().values.sqrt().cpu().numpy()

    @property
    def mean_(self) -> Any:
        """Mean (D,)."""
        return self._solved().mean.cpu().numpy()

    @property
    def n_components_(self) -> int:
        """k."""
        return len(self._solved().values)

    def _solve(self, everything: Rows | Moments) -> _Basis:
        count = float(everything.count)
        if count <= 1:
            raise ValueError(f"n_samples={count:g}: a variance needs at least 2 rows")
        if isinstance(everything, Rows):
            x, _, mean, _ = everything.about()
            spectrum = Spectrum.of_rows(x)
        else:
            spectrum, mean = Spectrum.of(everything.S), everything.mean_x
        values = spectrum.values.clamp_min(0).flip(0)
        k, total = self._number(values), values.sum()
        components = spectrum.vectors.flip(1)[:, :k]
        return _Basis(mean, components * signs(components), values[:k], total, count)

    def _number(self, values: Tensor) -> int:
        wanted = self.n_components
        if wanted is None:
            return len(values)
        if 0 < wanted < 1:
            reached = values.cumsum(0) / values.sum()
            return min(int((reached < wanted).sum()) + 1, len(values))
        if wanted != int(wanted) or not 1 <= wanted <= len(values):
            raise ValueError(
                f"n_components={wanted}: expected None, a share between 0 and 1, or a number from 1 to {len(values)}, the "
                "rank that these rows can have"
            )
        return int(wanted)

    def _deviations(self) -> Tensor | float:
        """Standard deviations [k] that whitening divides by; no variance divides by 1e-8 of the largest."""
        if not self.whiten:
            return 1.0
        basis = self._solved()
        deviations = (basis.values / (basis.count - 1)).sqrt()
        return deviations.clamp_min(1e-8 * float(deviations[:1].sum()) or 1.0)

    def _apply(self, rows: Tensor) -> Tensor:
        basis = self._solved()
        return (rows - basis.mean.to(rows)) @ (basis.components / self._deviations()).to(rows)
