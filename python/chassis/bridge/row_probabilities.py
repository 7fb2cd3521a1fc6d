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
    step = max(1, CELLS // max(n_rows, cells))
    for begin in range(0, len(states.plan), step):
        tile = slice(begin, min(begin + step, len(states.plan)))
        mixtures = [states.mixture(position) for position in range(tile.start, tile.stop)]
        logits, share = states.rows(np.arange(tile.start, tile.stop))
        P = torch.zeros(len(mixtures), n_rows, device=logits.device)
        P[:, : logits.shape[1]] = (logits.float() / states.temperature).softmax(1) * share.exp()[:, None]
        place = torch.arange(len(mixtures)).repeat_interleave(torch.tensor([len(m.rows) for m in mixtures]))
        rows = torch.from_numpy(np.concatenate([m.rows for m in mixtures]))
        listed = torch.from_numpy(np.exp(np.concatenate([m.logs for m in mixtures]))).float()
        P.index_put_((place.to(P.device), rows.to(P.device)), listed.to(P.device), accumulate=True)
        yield tile, P
