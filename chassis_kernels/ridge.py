"""Ridge regression from streamed moments (Hoerl & Kennard 1970).

    W = (S + αI)⁻¹ C        b = m_y − m_x W

One α: Cholesky in float64. Several: one eigendecomposition S = V s Vᵀ, then W = V (VᵀC / (s + α)) for each. α = 0 asks for
the least squares solution of minimal norm; where S is regular, as its tridiagonal form tells, no eigenvectors are needed.
Fewer rows than columns: the dual W = Xᵀ (XXᵀ + αI)⁻¹ Y. S is positive semi-definite but for rounding, so negative
eigenvalues count as 0.

Ridge is linear in its targets: for logits H W_Uᵀ it is the ridge onto H, times W_Uᵀ, and no [N, V] matrix is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from chassis_kernels import rows, solvers
from chassis_kernels.moments import Moments
from chassis_kernels.statistics import Rows
from chassis_kernels.tridiagonal import Tridiagonal


@dataclass(eq=False)
class RidgeSolution:
    """W [D, T] and b [T] in float64 for the absolute penalty `alpha`: predictions are x @ W + b."""

    W: Tensor
    b: Tensor
    alpha: float
    _shifted: Tensor | None = field(default=None, repr=False)  # S + alpha I, or XXᵀ + alpha I
    _eigenvalues: Tensor | None = field(default=None, repr=False)

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of S, ascending, [D]; costs an eigendecomposition when a single α was solved."""
        found = self._eigenvalues
        if found is None:
            found = solvers.decompose(torch.linalg.eigvalsh, self._shifted) - self.alpha
        missing = len(self.W) - len(found)
        return torch.cat([found, found.new_zeros(missing)]).sort().values if missing else found

    @property
    def condition(self) -> float:
        """Condition number of S: the largest eigenvalue over the smallest absolute one."""
        return solvers.condition(self.eigenvalues)

    @property
    def dof(self) -> float:
        """Effective degrees of freedom, Σ s/(s+α), between 0 and D; the intercept is not counted."""
        return solvers.degrees_of_freedom(self.eigenvalues, self.alpha)

    @property
    def negative_eigenvalues(self) -> int:
        """How many eigenvalues of S rounding has made negative; 0 for well-conditioned data."""
        return int((self.eigenvalues < 0).sum())


@dataclass(eq=False)
class HeadMap:
    """Coefficients [D, V] as `hidden` [D, E] times the transpose of `unembedding` [V, E]; x @ W works."""

    hidden: Tensor
    unembedding: Tensor

    @property
    def shape(self) -> torch.Size:
        """(D, V)."""
        return torch.Size((len(self.hidden), len(self.unembedding)))

    def dense(self) -> Tensor:
        """The coefficients themselves, [D, V]."""
        return self.hidden @ self.unembedding.T.to(self.hidden.dtype)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return (x @ self.hidden) @ self.unembedding.T.to(self.hidden.dtype)


def solve(moments: Moments, alpha: float = 1e-3, *, alpha_scale: str = "trace", intercept: bool = True) -> RidgeSolution:
    """Ridge for one penalty: `alpha * tr(S)/D` with alpha_scale="trace" (free of units), `alpha` itself with "none".

    An α above 0 but below 10 eps λ_max is raised to that, with a RuntimeWarning naming cond(S), the effective degrees of
    freedom and the negative eigenvalues; so is it warned when rounding left eigenvalues below -α. α = 0 gives the least
    squares solution of minimal norm, with the same warning if S is singular. Raises ValueError for moments without rows
    or without y, and for an α that is negative or not finite.
    """
    S, C = _normal_equations(moments, intercept)
    absolute = solvers.relative_alpha(alpha, alpha_scale, S.trace() / len(S))
    W = _least_squares(S, C) if absolute == 0 else None
    W, used, shifted, eigenvalues = _solve(S, C, absolute) if W is None else (W, 0.0, S, None)
    return RidgeSolution(W, _bias(moments, W, intercept), used, shifted, eigenvalues)


def solve_path(
    moments: Moments, alphas: Iterable[float], *, alpha_scale: str = "trace", intercept: bool = True
) -> Iterator[RidgeSolution]:
    """Solutions for several penalties, in their order, from one eigendecomposition; otherwise as `solve`."""
    S, C = _normal_equations(moments, intercept)
    absolutes = [solvers.relative_alpha(alpha, alpha_scale, S.trace() / len(S)) for alpha in alphas]
    spectrum = solvers.Spectrum.of(S)
    projected = spectrum.vectors.T @ C

    def solutions() -> Iterator[RidgeSolution]:
        for absolute in absolutes:
            scale, used = spectrum.scale(absolute)
            W = spectrum.vectors @ (scale[:, None] * projected)
            yield RidgeSolution(W, _bias(moments, W, intercept), used, None, spectrum.values)

    return solutions()


def solve_rows(few: Rows, alpha: float = 1e-3, *, alpha_scale: str = "trace", intercept: bool = True) -> RidgeSolution:
    """`solve` in dual form, [N, N], for rows that are fewer than columns."""
    x, y, mean_x, mean_y = few.about(intercept)
    K = x @ x.T
    absolute = solvers.relative_alpha(alpha, alpha_scale, K.trace() / x.shape[1])
    dual, used, shifted, eigenvalues = _solve(K, y, absolute)
    W = x.T @ dual
    return RidgeSolution(W, mean_y - mean_x @ W, used, shifted, eigenvalues)


def fit_ridge(
    X: Tensor,  # [N, D]
    Y: Tensor | tuple[Tensor, Tensor],  # [N, T] or [N]; or (H [N, E], W_U [V, E]), standing for the targets H W_Uᵀ [N, V]
    lam: float,
    *,
    alpha_scale: str = "none",
    weight: Tensor | None = None,  # [N] >= 0
    nan: str = "raise",
) -> tuple[Tensor | HeadMap, Tensor]:
    """Ridge with an unpenalised intercept for data in memory: W [D, T] and b [1, T], predictions X @ W + b.

    Any float dtypes; the result is float64 if X or Y is, else float32, on their device. The penalty is `lam` on
    Σ(x-m)ᵀ(x-m), or relative to its trace with alpha_scale="trace". With N < D the dual form is solved, N x N. For targets
    (H, W_U) W is a `HeadMap`: X @ W works, W.dense() is the [D, V] matrix. Warnings and errors as for `solve`; rows with
    NaN or infinity raise ValueError, or are left out with nan="drop".
    """
    Y, head = Y if isinstance(Y, tuple) else (Y, None)
    Y = Y.unsqueeze(1) if Y.dim() == 1 else Y
    if X.dim() != 2 or Y.dim() != 2 or len(X) != len(Y) or X.shape[1] == 0 or Y.shape[1] == 0:
        raise ValueError(f"X {tuple(X.shape)}, Y {tuple(Y.shape)}: expected [N, D] and [N, T] with the same N, D and T > 0")
    if head is not None and (head.dim() != 2 or head.shape[1] != Y.shape[1] or not head.is_floating_point()):
        raise ValueError(
            f"targets (H {tuple(Y.shape)}, W_U {head.dtype} {tuple(head.shape)}): expected floats W_U [V, {Y.shape[1]}]"
        )
    dtype = torch.float64 if torch.float64 in (X.dtype, Y.dtype) else torch.float32
    if len(X) >= X.shape[1]:
        moments = Moments(X.shape[1], Y.shape[1], device=X.device).update(X, Y, weight=weight, nan=nan)
        solution = solve(moments, lam, alpha_scale=alpha_scale)
    else:
        batch, kept = rows.checked(X, Y, weight, None, widths=(X.shape[1], Y.shape[1]), device=X.device)
        [(kept, _)] = rows.screened([batch], kept, nan)
        solution = solve_rows(Rows(*rows.selected(batch, kept)), lam, alpha_scale=alpha_scale)
    W, b = solution.W.to(dtype), solution.b.to(dtype).unsqueeze(0)
    return (W, b) if head is None else (HeadMap(W, head), b @ head.T.to(dtype))


def _normal_equations(moments: Moments, intercept: bool) -> tuple[Tensor, Tensor]:
    if moments.rows == 0:
        raise ValueError("these moments have seen no rows: update them before solving")
    if moments.dim_y == 0:
        raise ValueError("these moments have no y (dim_y=0): there is nothing to regress on")
    S, C = moments.S, moments.C
    if not intercept:
        S.addr_(moments.mean_x, moments.mean_x, alpha=float(moments.count))
        C = C.addr(moments.mean_x, moments.mean_y, alpha=float(moments.count))
    solvers.ensure_finite(S, C)
    return S, C


def _bias(moments: Moments, W: Tensor, intercept: bool) -> Tensor:
    return moments.mean_y - moments.mean_x @ W if intercept else torch.zeros_like(moments.mean_y)


def _least_squares(S: Tensor, C: Tensor) -> Tensor | None:
    """S⁻¹ C where S is regular beyond its rounding error and has a quick tridiagonal form, else None."""
    basis = Tridiagonal.quickly(S.clone())
    if basis is None or not basis.definite(-solvers.rounding(basis.largest(), len(S))):
        return None
    zero = C.new_zeros(C.shape[1])
    return basis.solve(basis.path(C, zero[:0])[0], zero)


def _solve(S: Tensor, C: Tensor, alpha: float) -> tuple[Tensor, float, Tensor | None, Tensor | None]:
    """(S + αI)⁻¹ C, the α used, and S + αI or the eigenvalues, whichever is known."""
    bound = min(float(S.trace()), float(S.abs().sum(0).max()))  # of the largest eigenvalue
    if alpha > solvers.FLOOR * bound:
        shifted = S.clone()
        shifted.diagonal().add_(alpha)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            return torch.cholesky_solve(C, factor), alpha, shifted, None
    spectrum = solvers.Spectrum.of(S)
    scale, used = spectrum.scale(alpha)
    return spectrum.vectors @ (scale[:, None] * (spectrum.vectors.T @ C)), used, None, spectrum.values
