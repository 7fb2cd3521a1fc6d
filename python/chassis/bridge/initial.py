"""A start for adapters fitted through a bridge that asks for no table: the change of logits the expert's states foretell.

    h A W_sᵀ - h W_Bᵀ        A: ridge of the expert's final state on the base's, at the same places of the text
                             W_s: rows of the expert's width for the base's tokens, `head_by_rows("ridge")`

Alone it is a poor start; part of it beside the Gauss-Newton step is a better one than the step alone (see `chassis.newton`).
The states are those of the pass that collects the targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from chassis.bridge.bridge import Bridge
from chassis.bridge.plan import Plan
from chassis.bridge.semantic import head_by_rows
from chassis.bridge.stretches import starts
from chassis.closed_form import Change, full_change
from chassis.errors import BridgeError
from chassis.experts import Readout
from chassis.statistics import Statistics
from chassis_kernels import Moments, ridge

ROWS = 32  # places that both models read for each column of A


def semantic_change(base: Readout, expert: Readout, bridge: Bridge, pairs: Moments, alpha: float) -> Change:
    """The full-rank change of the logits of the base, from the moments of final states (base's, expert's) of `add_pairs`.

    Raises BridgeError where the vocabularies share too few tokens, or the two models cap their logits differently, and
    without any pairs.
    """
    if base.softcap != expert.softcap:
        raise BridgeError(
            f"the base caps its logits at {base.softcap} and the expert at {expert.softcap}: give --init newton"
        )
    if not pairs.rows:
        raise BridgeError("no place of the text where tokens of both models end: give more text, or --init newton")
    statistics = Statistics(base, head_by_rows("ridge", bridge, base, expert).readout)
    statistics.final = pairs
    return full_change(statistics, ridge.solve(pairs, alpha).W)


def add_pairs(
    pairs: Moments,
    base: torch.Tensor,
    trunks: torch.Tensor,
    plans: Sequence[Plan],
    following: Sequence[np.ndarray],
    places: Sequence[np.ndarray],
) -> None:
    """Add final states where a token of the base ends and one of the expert's, as it encodes the whole text; nothing once
    there are ROWS for each column. base [m, D_B] and the expert's along the `trunks` [Σ (n_trunk + 1), D_E] of `plans`; for
    each plan the positions that are `following` those `places` of base."""
    if pairs.rows >= ROWS * base.shape[1]:
        return
    first, rows, nodes = starts(np.array([plan.tree.n_trunk + 1 for plan in plans])), [], []
    for plan, begin, after, own in zip(plans, first, following, places, strict=False):
        position = np.repeat(np.arange(len(plan)), np.diff(plan.ended_start))
        on_trunk, node = plan.ended <= plan.tree.n_trunk, np.full(len(plan), -1)
        node[position[on_trunk]] = plan.ended[on_trunk]
        there = node[after] >= 0
        rows.append(own[there])
        nodes.append(begin + node[after[there]])
    x, y = base[torch.from_numpy(np.concatenate(rows))], trunks[torch.from_numpy(np.concatenate(nodes))]
    pairs.update(x.float(), y.to(x.device).float(), nan="drop")  # whoever collects the rows reports them
