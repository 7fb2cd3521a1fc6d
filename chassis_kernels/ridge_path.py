"""Ridge for many penalties at once, and their errors on rows held out, from the eigenbasis S = V diag(s) Vᵀ alone.

    R = VᵀC        W(α) = V Z(α),  Z = R / (s + α)        RSS_j(α) = q_j − Σ r_ij² (s_i + 2α) / (s_i + α)²

Generalised cross-validation (Golub, Heath & Wahba 1979), with dof(α) = Σ s/(s + α) and the intercept:

    GCV_j(α) = (RSS_j / n) / (1 − (1 + dof) / n)²

Held-out rows enter through their moments S', C', q' about the fitted rows' means: q' − 2 Σ Z ∘ VᵀC' + Σ Z ∘ (VᵀS'V) Z.
Summed over all targets either costs next to nothing for each α.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chassis_kernels.moments import Moments
from chassis_kernels.solvers import Spectrum, relative_alpha
from chassis_kernels.statistics import Rows

TIE = 1e-10  # of a target's variance: errors closer than this are equal


@dataclass(eq=False)
class Eigenbasis:
    """A ridge problem after the one decomposition it needs; all float64."""

    spectrum: Spectrum
    R: Tensor  # [r, T]
    q: Tensor  # [T], Σ (y − m_y)²
    mean_x: Tensor  # [D], 0 without intercept
    mean_y: Tensor  # [T]
    count: float
    intercept: bool

    @classmethod
    def of(cls, fitted: Rows | Moments, intercept: bool) -> Eigenbasis:
        """Raises ValueError where there are no rows."""
        if isinstance(fitted, Rows):
            x, y, mean_x, mean_y = fitted.about(intercept)
            spectrum = Spectrum.of_rows(x)
            R, q = (x @ spectrum.vectors).T @ y, y.square().sum(0)
        else:
            if fitted.rows == 0:
                raise ValueError("no rows to fit: N = 0")
            zero = [torch.zeros_like(mean) for mean in (fitted.mean_x, fitted.mean_y)]
            mean_x, mean_y = (fitted.mean_x, fitted.mean_y) if intercept else zero
            S, C, q = _about(fitted, mean_x, mean_y)
            spectrum = Spectrum.of(S)
            R = spectrum.vectors.T @ C
        return cls(spectrum, R, q, mean_x, mean_y, float(fitted.count), intercept)

    def absolute(self, alphas: Sequence[float], alpha_scale: str) -> Tensor:
        """The penalties on this S, [A]; see `solvers.relative_alpha`."""
        unit = float(self.spectrum.values.sum()) / len(self.mean_x)
        return self.q.new_tensor([relative_alpha(alpha, alpha_scale, unit) for alpha in alphas])

    def degrees_of_freedom(self, penalties: Tensor) -> Tensor:
        """Σ s / (s + α), [A]."""
        return self.spectrum.scales(penalties)[0] @ self.spectrum.values.clamp_min(0)

    def gcv(self, penalties: Tensor, per_target: bool = True) -> Tensor:
        """GCV_j(α), [A, T], or their sum, [A, 1]; infinite where as many degrees of freedom as rows are used."""
        squares, q = self.R.square(), self.q
        if not per_target:
            squares, q = squares.sum(1, keepdim=True), q.sum(0, keepdim=True)
        scales, values = self.spectrum.scales(penalties)[0], self.spectrum.values.clamp_min(0)
        residual = (q - (scales * (2 - values * scales)) @ squares).clamp_min(0)
        left = 1 - (scales @ values + self.intercept) / self.count
        return torch.where(left > 1e-9, 1 / left.square(), torch.inf)[:, None] * residual / self.count

    def held_out(self, penalties: Tensor, rows: Rows | Moments, per_target: bool = True) -> Tensor:
        """Σ of the squared errors of rows that were not fitted, [A, T], or over all targets, [A, 1]."""
        V, R, scales = self.spectrum.vectors, self.R, self.spectrum.scales(penalties)[0]
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

    def coefficients(self, penalties: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W [D, T], b [T] and the penalties used, for one penalty [] or one per target [T]; warns like `Spectrum.scale`."""
        distinct, place = penalties.reshape(-1).unique(return_inverse=True)
        found = [self.spectrum.scale(alpha) for alpha in distinct.tolist()]
        scale = torch.stack([each for each, _ in found], 1)[:, place]  # [r, 1] or [r, T]
        used = penalties.new_tensor([alpha for _, alpha in found])[place].reshape(penalties.shape)
        W = self.spectrum.vectors @ (scale * self.R)
        return W, self.mean_y - self.mean_x @ W, used


def largest_of_the_best(alphas: Tensor, errors: Tensor, variance: Tensor) -> Tensor:
    """Indices [...] of the alphas [A] with the smallest errors [A, ...]; of those within TIE of it the largest alpha."""
    tied = errors <= errors.min(0).values + TIE * variance
    candidates = torch.where(tied, alphas.reshape(-1, *[1] * (errors.dim() - 1)), -1.0)
    return candidates.argmax(0)


def _about(moments: Moments, mean_x: Tensor, mean_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S, C and q of the same rows about other means."""
    n, dx, dy = float(moments.count), moments.mean_x - mean_x, moments.mean_y - mean_y
    return moments.S.addr_(dx, dx, alpha=n), moments.C.addr(dx, dy, alpha=n), moments.q + n * dy.square()
