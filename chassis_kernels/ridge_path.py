"""Ridge for many penalties at once, and their errors, from one decomposition: S = V diag(s) Vᵀ or S = Q T Qᵀ.

    R = VᵀC        W(α) = V Z(α),  Z = R / (s + α)        RSS_j(α) = q_j − c_j·w_j − α w_j·w_j

Generalised cross-validation (Golub, Heath & Wahba 1979), with dof(α) = Σ s/(s + α) and the intercept:

    GCV_j(α) = (RSS_j / n) / (1 − (1 + dof) / n)²

Held-out rows enter through their moments S', C', q' about the fitted rows' means: q' − 2 Σ Z ∘ VᵀC' + Σ Z ∘ (VᵀS'V) Z.
Summed over all targets either costs next to nothing for each α. A path without held-out rows needs no eigenvectors: T
tridiagonal will do (`tridiagonal.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chassis_kernels.moments import Moments
from chassis_kernels.solvers import FLOOR, Spectrum, ensure_finite, relative_alpha
from chassis_kernels.statistics import Rows
from chassis_kernels.tridiagonal import Tridiagonal

TIE = 1e-10  # of a target's variance: errors closer than this are equal


@dataclass(eq=False)
class _Basis:
    """A ridge problem after the one decomposition it needs; all float64."""

    q: Tensor  # [T], Σ (y − m_y)²
    mean_x: Tensor  # [D], 0 without intercept
    mean_y: Tensor  # [T]
    count: float
    intercept: bool
    penalties: Tensor  # [A], absolute

    def gcv(self, per_target: bool = True) -> Tensor:
        """GCV_j(α), [A, T], or their sum, [A, 1]; infinite where as many degrees of freedom as rows are used."""
        left = 1 - (self.degrees_of_freedom() + self.intercept) / self.count
        factor = torch.where(left > 1e-9, 1 / left.square(), torch.inf) / self.count
        return factor[:, None] * self._residual(per_target).clamp_min(0)


@dataclass(eq=False)
class TridiagonalBasis(_Basis):
    """S = Q T Qᵀ of moments on the CPU, for penalties that make S + α safely positive definite."""

    tridiagonal: Tridiagonal
    R: Tensor  # [D, T], QᵀC
    dots: Tensor  # [A, T], Σ C ∘ W(α)
    squares: Tensor  # [A, T], Σ W(α)²
    traces: Tensor  # [A], tr (S + α)⁻¹

    @classmethod
    def of(cls, fitted: Moments, intercept: bool, alphas: Sequence[float], alpha_scale: str) -> TridiagonalBasis | None:
        """None where `Spectrum.scale` might change a penalty, so small is it, and where eigenvectors are as quick.

        Raises ValueError where there are no rows.
        """
        S, C, *centred, penalties = _centred(fitted, intercept, alphas, alpha_scale)
        tridiagonal = Tridiagonal.quickly(S)
        if tridiagonal is None:
            return None
        smallest, floor = float(penalties.min()), FLOOR * tridiagonal.largest()
        if smallest < 2 * floor or not tridiagonal.definite(smallest - floor):
            return None
        return cls(*centred, penalties, tridiagonal, *tridiagonal.path(C, penalties))

    def degrees_of_freedom(self) -> Tensor:
        """Σ s / (s + α), [A]."""
        return (len(self.R) - self.penalties * self.traces).clamp_min(0)

    def _residual(self, per_target: bool) -> Tensor:
        residual = self.q - self.dots - self.penalties[:, None] * self.squares
        return residual if per_target else residual.sum(1, keepdim=True)

    def coefficients(self, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W [D, T], b [T] and the penalties used, for one place among the penalties, [], or one per target, [T]."""
        used = self.penalties[which]
        W = self.tridiagonal.solve(self.R, used.expand(self.R.shape[1]))
        return W, self.mean_y - self.mean_x @ W, used


@dataclass(eq=False)
class Eigenbasis(_Basis):
    """S = V diag(s) Vᵀ: for rows or moments anywhere, and for any penalty."""

    spectrum: Spectrum
    R: Tensor  # [r, T], VᵀC

    @classmethod
    def of(cls, fitted: Rows | Moments, intercept: bool, alphas: Sequence[float], alpha_scale: str) -> Eigenbasis:
        """Raises ValueError where there are no rows."""
        if isinstance(fitted, Rows):
            x, y, mean_x, mean_y = fitted.about(intercept)
            spectrum, q = Spectrum.of_rows(x), y.square().sum(0)
            penalties = _absolute(alphas, alpha_scale, x.square().sum() / x.shape[1])
            R = (x @ spectrum.vectors).T @ y
            return cls(q, mean_x, mean_y, float(fitted.count), intercept, penalties, spectrum, R)
        S, C, *centred = _centred(fitted, intercept, alphas, alpha_scale)
        spectrum = Spectrum.of(S)
        return cls(*centred, spectrum, spectrum.vectors.T @ C)

    def degrees_of_freedom(self) -> Tensor:
        """Σ s / (s + α), [A]."""
        return self.spectrum.scales(self.penalties)[0] @ self.spectrum.values.clamp_min(0)

    def _residual(self, per_target: bool) -> Tensor:
        squares, q = self.R.square(), self.q
        if not per_target:
            squares, q = squares.sum(1, keepdim=True), q.sum(0, keepdim=True)
        scales = self.spectrum.scales(self.penalties)[0]
        return q - (scales * (2 - self.spectrum.values.clamp_min(0) * scales)) @ squares

    def held_out(self, rows: Rows | Moments, per_target: bool = True) -> Tensor:
        """Σ of the squared errors of rows that were not fitted, [A, T], or over all targets, [A, 1]."""
        V, R, scales = self.spectrum.vectors, self.R, self.spectrum.scales(self.penalties)[0]
        if isinstance(rows, Rows):
            x, y, *_ = rows.about(means=(self.mean_x, self.mean_y))
            z = x @ V
            P, B, q = z.T @ z, z.T @ y, y.square().sum(0)
        else:
            S, C, q = _about(rows, self.mean_x, self.mean_y)
            P, B = V.T @ S @ V, V.T @ C
        if per_target:
            Zs = (scale[:, None] * R for scale in scales)
            errors = torch.stack([q + (Z * (P @ Z - 2 * B)).sum(0) for Z in Zs])
        else:  # Σ_j z_jᵀ P z_j = σᵀ (P ∘ RRᵀ) σ with σ = 1/(s + α)
            quadratic = (scales @ (P * (R @ R.T)) * scales).sum(1)
            errors = (q.sum() - 2 * scales @ (R * B).sum(1) + quadratic)[:, None]
        return errors.clamp_min(0)

    def coefficients(self, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As for `TridiagonalBasis`; warns like `Spectrum.scale`."""
        distinct, place = self.penalties[which].reshape(-1).unique(return_inverse=True)
        found = [self.spectrum.scale(alpha) for alpha in distinct.tolist()]
        scale = torch.stack([each for each, _ in found], 1)[:, place]  # [r, 1] or [r, T]
        used = self.q.new_tensor([alpha for _, alpha in found])[place].reshape(which.shape)
        W = self.spectrum.vectors @ (scale * self.R)
        return W, self.mean_y - self.mean_x @ W, used


def basis_of(fitted: Rows | Moments, intercept: bool, alphas: Sequence[float], alpha_scale: str) -> _Basis:
    """The basis that serves these penalties at the lowest price."""
    arguments = fitted, intercept, alphas, alpha_scale
    found = TridiagonalBasis.of(*arguments) if isinstance(fitted, Moments) else None
    return found or Eigenbasis.of(*arguments)


def largest_of_the_best(alphas: Tensor, errors: Tensor, variance: Tensor) -> Tensor:
    """Indices [...] of the alphas [A] with the smallest errors [A, ...]; of those within TIE of it the largest alpha."""
    tied = errors <= errors.min(0).values + TIE * variance
    candidates = torch.where(tied, alphas.reshape(-1, *[1] * (errors.dim() - 1)), -1.0)
    return candidates.argmax(0)


def _absolute(alphas: Sequence[float], alpha_scale: str, unit: Tensor) -> Tensor:
    return unit.new_tensor([relative_alpha(alpha, alpha_scale, unit) for alpha in alphas])


def _centred(fitted: Moments, intercept: bool, alphas: Sequence[float], alpha_scale: str) -> tuple:
    """S, C, and what a `_Basis` holds."""
    if fitted.rows == 0:
        raise ValueError("no rows to fit: N = 0")
    zero = [torch.zeros_like(mean) for mean in (fitted.mean_x, fitted.mean_y)]
    mean_x, mean_y = (fitted.mean_x, fitted.mean_y) if intercept else zero
    S, C, q = _about(fitted, mean_x, mean_y)
    ensure_finite(S, C)
    penalties = _absolute(alphas, alpha_scale, S.trace() / len(S))
    return S, C, q, mean_x, mean_y, float(fitted.count), intercept, penalties


def _about(moments: Moments, mean_x: Tensor, mean_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S, C and q of the same rows about other means."""
    n, dx, dy = float(moments.count), moments.mean_x - mean_x, moments.mean_y - mean_y
    return moments.S.addr_(dx, dx, alpha=n), moments.C.addr(dx, dy, alpha=n), moments.q + n * dy.square()
