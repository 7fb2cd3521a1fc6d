"""What the expert says at a base position, as one distribution over the rows of a table: its tokens and their residuals."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from chassis.bridge.apply import States

CELLS = 8_000_000  # of a tile [positions, rows]


def row_probabilities(states: States, n_rows: int, cells: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """(positions, P [n, n_rows] float32) for all positions of a plan, in order, in tiles; every row of P sums to 1.

    `cells`: numbers that the caller makes for each position, to choose tiles that fit into memory.
    """
    step = max(1, CELLS // max(n_rows, cells))
    for begin in range(0, len(states.plan), step):
        of = slice(begin, min(begin + step, len(states.plan)))
        tile, P = states.tile(of), torch.zeros(of.stop - of.start, n_rows, device=states.logits.device)
        z = states.logits[tile.nodes].float() / states.temperature
        own, listed = (torch.repeat_interleave(start.diff()) for start in (tile.nodes_start, tile.listed_start))
        P[:, : z.shape[1]].index_add_(0, own, z.softmax(1) * tile.shares.exp()[:, None])
        P.index_put_((listed, tile.rows), tile.logs.exp(), accumulate=True)
        yield of, P
