"""The expert's next-token probabilities as probabilities of base tokens, through a sparse table M [rows, V_B].

    P = Σ_s w_s softmax(z_s / τ) over the expert's tokens  +  the probabilities listed one by one
    q = Pᵀ M,   mass = Σ_t P(t) Σ_b M[t, b],   u = Σ_t P(t) (1 - max_b M[t, b]) + (1 - Σ_t P(t))
    with blocked tokens: q(b) = 0 for them, and the rest scaled so that Σ_b q(b) = mass again
    with a floor, last:  q(b) := (1 - Σ_b floor(b)) q(b) + floor(b)

What P does not hold (the tail of a top-k) and what M leaves unmapped is in neither q nor mass. It is scaled away only where
`normalize` asks for q / mass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chassis_kernels.reference.precision import compute_dtype, without_autocast


@without_autocast
def bridge_project(
    logits: Tensor,  # [N, >= width], or [any, >= width] with index
    index: Tensor | None,  # [S] int64, which rows of logits are read; None: all, each of them for one row
    index_start: Tensor | None,  # [N + 1] where those of each row begin; None: one for each
    log_weight: Tensor | None,  # [S], log w; None: 0
    log_probs: Tensor | None,  # [L], with ids; -1: nothing
    ids: Tensor | None,  # [L] int64, rows of M
    listed_start: Tensor | None,  # [N + 1] where those of each row begin
    start: Tensor,  # [V_B + 1], with rows and weights the table's column view
    rows: Tensor,
    weights: Tensor,
    row_sum: Tensor,  # [rows]
    spread: Tensor,  # [rows] 1 - max_b M[t, b]
    blocked_start: Tensor | None,  # [lists + 1]
    blocked: Tensor | None,  # [nnz] int32
    previous: Tensor | None,  # [N] int64, which list; -1: none
    floor: Tensor | None,  # [V_B]
    width: int,
    temperature: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """log q [N, V_B], mass [N] and u [N]. A row whose logits are all -inf has no probability from them."""
    dtype = compute_dtype(logits, log_probs, weights)
    z = (logits if index is None else logits[index])[:, :width].to(dtype)
    of = torch.arange(len(z), device=z.device) if index_start is None else torch.repeat_interleave(index_start.diff())
    n = len(z) if index_start is None else len(index_start) - 1
    alive = (z != -torch.inf).any(1)
    share = alive.to(dtype) if log_weight is None else torch.where(alive, log_weight.to(dtype).exp(), 0.0)
    dense = torch.softmax(torch.where(alive[:, None], z, 0.0) / temperature, 1) * share[:, None]
    p = torch.nn.functional.pad(z.new_zeros(n, width).index_add(0, of, dense), (0, len(row_sum) - width))
    share = z.new_zeros(n).index_add(0, of, share)
    if ids is not None:
        listed, of = torch.where(ids >= 0, log_probs.to(dtype).exp(), 0.0), torch.repeat_interleave(listed_start.diff())
        p = p.index_put((of, ids.clamp_min(0)), listed, accumulate=True) if len(row_sum) else p
        share = share.index_add(0, of, listed)
    q = p.new_zeros(n, len(start) - 1).index_add(1, torch.repeat_interleave(start.diff()), p[:, rows] * weights.to(dtype))
    mass = p @ row_sum.to(dtype)
    uncertainty = p @ spread.to(dtype) + (1 - share).clamp_min(0)
    factor = torch.ones_like(mass)
    if previous is not None:
        kept = torch.ones(q.shape, dtype=torch.bool, device=q.device)
        kept[blocked_places(blocked_start, blocked, previous)] = False
        q = torch.where(kept, q, 0.0)
        rest = q.sum(1)
        left = rest > torch.finfo(torch.float32).tiny
        mass = torch.where((previous >= 0) & ~left, 0.0, mass)
        factor = torch.where(previous >= 0, torch.where(left, mass / rest, 0.0), factor)
    if normalize:
        factor = torch.where(mass > 0, factor / mass, factor)
    q = q * factor[:, None]
    if floor is not None:
        q = (1 - floor.to(dtype).sum()) * q + floor.to(dtype)
    return q.log(), mass, uncertainty


def blocked_places(start: Tensor, tokens: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """(row, token) of every blocked token."""
    rows = (previous >= 0).nonzero()[:, 0]
    first = start[previous[rows]]
    count = start[previous[rows] + 1] - first
    offset = torch.arange(int(count.sum()), device=start.device) - torch.repeat_interleave(count.cumsum(0) - count, count)
    return torch.repeat_interleave(rows, count), tokens[torch.repeat_interleave(first, count) + offset].long()
