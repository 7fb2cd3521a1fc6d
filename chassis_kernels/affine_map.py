"""Affine maps from the hidden states of one model or layer to those of another, in closed form from moments.

    procrustes   y ≈ s (x − m_x) R + m_y,  R = U Vᵀ from the SVD C = U Σ Vᵀ (Schönemann 1966),  s = tr Σ / tr(Rᵀ S R)
    stitch       y ≈ γ (x − m_x) W + m_y,  W by ridge,  γ so that the mean square of the output is that of y

A least-squares map shrinks what it cannot predict; a model reads states of the size it was trained on, hence γ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chassis_kernels import ridge
from chassis_kernels.moments import Moments
from chassis_kernels.solvers import thin_svd


@dataclass(eq=False)
class AffineMap:
    """x -> x @ W + b, W [D, T] and b [T] in float64; with `rms` every output row is then given that root mean square."""

    W: Tensor
    b: Tensor
    scale: float  # s or γ above, contained in W
    residual: float  # mean squared error on the rows fitted, over the variance of y
    rms: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Rows [..., D] mapped to [..., T], in float64 if x is, else in float32."""
        x = x if x.dtype == torch.float64 else x.float()
        y = x @ self.W.to(x) + self.b.to(x)
        if self.rms is None:
            return y
        return y * (self.rms / y.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(y.dtype).tiny))


def procrustes(x: Tensor | Moments, y: Tensor | None = None, *, scale: bool = True) -> AffineMap:
    """The rotation or reflection, with one scale, that brings x [N, D] nearest to y [N, T]; or `Moments` of such pairs.

    With D ≠ T the map has orthonormal rows or columns. Without `scale` s is 1. Raises ValueError for rows that do not fit,
    hold NaN or infinity, or do not vary together.
    """
    moments = _moments(x, y)
    S, C = moments.S, moments.C
    U, values, V = thin_svd(C)
    if not values.sum() > 0:
        raise ValueError("x and y do not vary together: no rotation is better than another")
    R = U @ V.T
    spread = (R * (S @ R)).sum()
    s = float(values.sum() / spread) if scale else 1.0
    error = moments.q.sum() - 2 * s * values.sum() + s**2 * spread
    return AffineMap(s * R, moments.mean_y - moments.mean_x @ (s * R), s, float(error / moments.q.sum()))


def stitch(
    x: Tensor | Moments,
    y: Tensor | None = None,
    *,
    alpha: float = 1e-3,
    alpha_scale: str = "trace",
    match: str = "mean",
) -> AffineMap:
    """The ridge map from x [N, D] to y [N, T], or of `Moments` of such pairs, with outputs of the size of y.

    `match`: "mean" scales the deviations by one γ, so that the root mean square over the rows fitted is that of y; "row"
    also gives every output row this root mean square; "none" is ridge as it is. Errors and warnings as for `ridge.solve`.
    """
    if match not in ("mean", "row", "none"):
        raise ValueError(f'match={match!r}: expected "mean", "row" or "none"')
    moments = _moments(x, y)
    W, count = ridge.solve(moments, alpha, alpha_scale=alpha_scale).W, moments.count
    explained, shared = (W * (moments.S @ W)).sum(), (W * moments.C).sum()
    gamma = 1.0
    if match != "none":
        if not explained > 0:
            raise ValueError("x explains nothing of y: there is no size to match")
        gamma = float((moments.q.sum() / explained).sqrt())
    error = moments.q.sum() - 2 * gamma * shared + gamma**2 * explained
    rms = (moments.q.sum() / count + moments.mean_y.square().sum()).div(moments.dim_y).sqrt()
    W = gamma * W
    b = moments.mean_y - moments.mean_x @ W
    return AffineMap(W, b, gamma, float(error / moments.q.sum()), float(rms) if match == "row" else None)


def _moments(x: Tensor | Moments, y: Tensor | None) -> Moments:
    if not isinstance(x, Moments):
        if y is None or x.dim() != 2 or y.dim() != 2:
            shape = None if y is None else tuple(y.shape)
            raise ValueError(f"x {tuple(x.shape)}, y {shape}: expected [N, D] and [N, T], or moments of such pairs")
        x = Moments(x.shape[1], y.shape[1], device=x.device).update(x, y)
    if x.rows == 0 or x.dim_y == 0:
        raise ValueError(f"{x}: expected moments of rows x and y")
    return x
