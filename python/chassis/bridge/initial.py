"""A start for adapters fitted through a bridge that asks for no table: the change of logits the expert's states foretell.

    h A W_sᵀ - h W_Bᵀ        A: ridge of the expert's final state on the base's, at the same places of the text
                             W_s: rows of the expert's width for the base's tokens, `head_by_rows("ridge")`

Alone it is a poor start; part of it beside the Gauss-Newton step is a better one than the step alone (see `chassis.newton`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from chassis.bridge.semantic import head_by_rows
from chassis.closed_form import Change, full_change
from chassis.errors import BridgeError
from chassis.experts import Readout
from chassis.models import capture, inspect_head
from chassis.probes import Window, pad
from chassis.statistics import Statistics
from chassis_kernels import ridge

if TYPE_CHECKING:  # which offers this change
    from chassis.bridge.expert import BridgedExpert

ROWS = 32  # places that both models read for each column of A
AT_ONCE = 16  # windows of a batch


@torch.no_grad()
def semantic_change(model: torch.nn.Module, expert: BridgedExpert, windows: Sequence[Window], alpha: float) -> Change:
    """The full-rank change of the logits of the base `model`, from as many of `windows` as have ROWS places a column.

    Raises BridgeError where the vocabularies share too few tokens, or the two models cap their logits differently.
    """
    head, bridge = inspect_head(model), expert.bridge
    base, theirs = Readout.of(head), Readout.of(inspect_head(expert.model))
    if base.softcap != theirs.softcap:
        raise BridgeError(
            f"the base caps its logits at {base.softcap} and the expert at {theirs.softcap}: give --init newton"
        )
    statistics = Statistics(base, head_by_rows("ridge", bridge, base, theirs).readout)
    for begin in range(0, len(windows), AT_ONCE):
        for x, y in _pairs(model, expert, windows[begin : begin + AT_ONCE]):
            statistics.final.update(x.float(), y.float())
        if statistics.final.rows >= ROWS * head.width:
            break
    return full_change(statistics, ridge.solve(statistics.final, alpha).W)


def _pairs(
    model: torch.nn.Module, expert: BridgedExpert, windows: Sequence[Window]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each window the states [n, D_B] of the base and [n, D_E] of the expert after the same text: where a token of the
    base ends and one of the expert's, as it encodes the whole window."""
    is_text, device = expert.bridge.base.is_text, model.get_input_embeddings().weight.device
    plans = expert.plans([window.ids[is_text[window.ids]].astype(np.int64) for window in windows])
    ids, mask, _ = pad([window.ids for window in windows], "right")
    own, own_mask, _ = pad([np.array([expert.start_id, *plan.expert_ids]) for plan in plans], "right")
    base = capture(model, ids.to(device), mask.to(device)).final
    theirs = expert.model.get_input_embeddings().weight.device
    others = capture(expert.model, own.to(theirs), own_mask.to(theirs)).final.to(device)
    for row, (window, plan) in enumerate(zip(windows, plans, strict=True)):
        trunk = plan.ended <= plan.tree.n_trunk
        position, node = np.repeat(np.arange(len(plan)), np.diff(plan.ended_start))[trunk], plan.ended[trunk]
        number = np.cumsum(is_text[window.ids])  # of the text token that comes after each place
        place = np.searchsorted(number, position, side="right") - 1
        seen = place >= 0  # nothing precedes the first token of a base without bos
        yield base[row, torch.from_numpy(place[seen])], others[row, torch.from_numpy(node[seen])]
