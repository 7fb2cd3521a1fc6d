"""Orthogonal matching pursuit for many rows at once: each as a combination of a few rows of a dictionary.

    minimise ‖y - c X‖ with at most k entries in c: again and again the atom that the residual points to most is added, and
    the residual projected off all atoms so far

Source: Pati, Rezaiifar & Krishnaprasad 1993; the projections by Gram-Schmidt, coefficients from its triangular factor.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 512  # rows at once


def matching_pursuit(atoms: Tensor, rows: Tensor, k: int) -> Tensor:
    """Coefficients [M, N] of `rows` [M, D] in `atoms` [N, D], at most k of a row not 0. Raises ValueError for k below 1."""
    if k < 1:
        raise ValueError(f"k is {k}: expected at least one atom a row")
    norms = atoms.norm(dim=1).clamp_min(torch.finfo(atoms.dtype).tiny)
    unit = atoms / norms[:, None]
    k = min(k, *atoms.shape)
    return torch.cat([_pursue(unit, tile, k) for tile in rows.split(TILE)]) / norms


def _pursue(unit: Tensor, rows: Tensor, k: int) -> Tensor:
    """Coefficients of `rows` in atoms of norm 1."""
    place = torch.arange(len(rows), device=rows.device)
    residual, basis = rows.clone(), rows.new_zeros(len(rows), k, rows.shape[1])  # basis: orthonormal, a row for each atom
    triangle = torch.eye(k, dtype=rows.dtype, device=rows.device).repeat(
        len(rows), 1, 1
    )  # atom i = Σ_j triangle[j, i] basis j
    along = rows.new_zeros(len(rows), k)  # the row's coordinates in the basis
    chosen = torch.zeros(len(rows), k, dtype=torch.long, device=rows.device)
    taken = torch.zeros(len(rows), len(unit), dtype=torch.bool, device=rows.device)
    for step in range(k):
        best = (residual @ unit.T).abs().masked_fill(taken, -1).argmax(1)
        taken[place, best], chosen[:, step], atom = True, best, unit[best]
        within = rows.new_zeros(len(rows), step)
        for _ in range(2):  # twice is enough to be orthogonal to rounding
            share = torch.einsum("nd,nkd->nk", atom, basis[:, :step])
            atom, within = atom - torch.einsum("nk,nkd->nd", share, basis[:, :step]), within + share
        size = atom.norm(dim=1)
        new = size > 1e-5  # an atom within the span of those before adds nothing
        atom = torch.where(new[:, None], atom / size.clamp_min(1e-30)[:, None], 0.0)
        basis[:, step], triangle[:, :step, step] = atom, within
        triangle[:, step, step] = torch.where(new, size, 1.0)
        along[:, step] = (residual * atom).sum(1)
        residual = residual - along[:, step, None] * atom
    coefficients = torch.linalg.solve_triangular(triangle, along[:, :, None], upper=True)[:, :, 0]
    return rows.new_zeros(len(rows), len(unit)).scatter_(1, chosen, coefficients)
