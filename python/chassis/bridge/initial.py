"""A start for adapters fitted through a bridge that asks for no table: the change of logits the expert's states foretell.

    h A W_sᵀ - h W_Bᵀ        A: ridge of the expert's final state on the base's, at the same places of the text
                             W_s: rows of the expert's width for the base's tokens, `head_by_rows("ridge")`

Alone it is a poor start; part of it beside the Gauss-Newton step is a better one than the step alone (see `chassis.newton`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from chassis.bridge.reading import Models, read
from chassis.bridge.semantic import head_by_rows
from chassis.bridge.windows import TextWindow
from chassis.closed_form import Change, full_change
from chassis.errors import BridgeError
from chassis.experts import Readout
from chassis.models import inspect_head
from chassis.probes import Window
from chassis.statistics import Statistics
from chassis_kernels import ridge

if TYPE_CHECKING:  # which offers this change
    from chassis.bridge.expert import BridgedExpert

ROWS = 32  # places that both models read for each column of A


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
    models = Models(model, head.logits, expert.bos_id, expert.model, expert.start_id)
    for window in windows:
        ids = window.ids[bridge.base.is_text[window.ids]]
        reading = read(models, bridge, TextWindow(b"".join(bridge.base.bytes[i] for i in ids).decode(), 0))
        node = reading.ended(bridge)
        kept = np.flatnonzero((node >= 0) & reading.base_hidden.isfinite().all(1).cpu().numpy())
        x, y = reading.base_hidden[torch.from_numpy(kept)], reading.hidden[torch.from_numpy(node[kept])]
        statistics.final.update(x.float(), y.float())
        if statistics.final.rows >= ROWS * head.width:
            break
    return full_change(statistics, ridge.solve(statistics.final, alpha).W)
