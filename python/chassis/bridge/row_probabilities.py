"""What the expert says at a base position, as one distribution over the rows of a table: its tokens and their residuals."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from chassis.bridge.apply import States

CELLS = 8_000_000  # of a tile [positions, rows]


def row_probabilities(states: States, n_rows: int, cells: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """(positions, P [n, n_rows] float32) for all positions of a plan, in order, in tiles; every row of P sums to 1.

    `cells`: numbers that the caller makes for each position, to choose tiles that fit into memory.
    """
    everything, _, start = states.mixtures
    step = max(1, CELLS // max(n_rows, cells))
    for begin in range(0, len(states.plan), step):
        tile = slice(begin, min(begin + step, len(states.plan)))
        positions = np.arange(tile.start, tile.stop)
        logits, share = states.rows(positions), states.shares[positions]
        P = torch.zeros(len(logits), n_rows, device=logits.device)
        P[:, : logits.shape[1]] = (logits.float() / states.temperature).softmax(1) * share.exp()[:, None]
        begins = start[tile.start : tile.stop + 1]
        listed = slice(begins[0], begins[-1])
        place = torch.from_numpy(np.repeat(np.arange(len(P)), np.diff(begins)))
        rows, p = (torch.from_numpy(x) for x in (everything.rows[listed], np.exp(everything.logs[listed])))
        P.index_put_((place.to(P.device), rows.to(P.device)), p.float().to(P.device), accumulate=True)
        yield tile, P
