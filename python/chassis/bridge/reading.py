"""One window of text read by both models: all that the estimators of a bridge look at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chassis.bridge.apply import States
from chassis.bridge.bridge import Bridge
from chassis.bridge.plan import Plan
from chassis.bridge.states import tree_logits
from chassis.bridge.windows import TextWindow
from chassis.models import capture
from chassis.models.forward import first_tensor, hooks, unembedding_of


@dataclass
class Models:
    """The two models: the base's with its logits, the token that opens its texts, the expert's and its opening token."""

    base_model: torch.nn.Module
    base_logits: Callable[[Tensor], Tensor]  # final states [n, D] -> logits [n, V]
    bos_id: int | None
    expert_model: torch.nn.Module
    start_id: int


@dataclass
class Reading:
    """One window, read once by both models; positions are the base tokens of `plan`, n of them."""

    part: TextWindow
    plan: Plan
    logits: Tensor  # [n_nodes, V_E], the expert's
    hidden: Tensor  # [n_nodes, D_E], what the expert's unembedding reads
    log_p: Tensor  # [n, V_B], the base's own log-probabilities
    base_hidden: Tensor  # [n, D_B], what the base's unembedding reads; NaN where nothing precedes and it has no bos

    @property
    def scored(self) -> Tensor:
        """[n] bool: positions that count in this window."""
        return torch.from_numpy(self.plan.begins >= self.part.seen)

    def chosen(self, log_probs: Tensor) -> Tensor:
        """Log-probability [n] float64 of the tokens of the text under log_probs [n, V_B]."""
        return log_probs.gather(1, torch.from_numpy(self.plan.base_ids)[:, None])[:, 0].double()

    def ended(self, bridge: Bridge) -> np.ndarray:
        """[n] the likeliest of the expert's states in which the text before a position is encoded; -1: there is none."""
        states = States(self.plan, self.logits, bridge.under_way, bridge.padding)
        return np.array([max(nodes, key=states.path.__getitem__, default=-1) for nodes in self.plan.complete])


@torch.no_grad()
def read(models: Models, bridge: Bridge, part: TextWindow) -> Reading:
    """Plan a window and run both models over it."""
    plan, kept = bridge.plan(part.text), []
    unembedding = unembedding_of(models.expert_model)
    with hooks() as handles:
        handles.append(unembedding.register_forward_pre_hook(lambda module, args: kept.append(first_tensor(args)[0])))
        logits = tree_logits(models.expert_model, plan.tree, models.start_id)
    base_hidden, log_p = _base(models, bridge, plan)
    return Reading(part, plan, logits, torch.cat(kept), log_p, base_hidden)


def _base(models: Models, bridge: Bridge, plan: Plan) -> tuple[Tensor, Tensor]:
    """Final states [n, D] and log-probabilities [n, V] of the base before each token; where nothing precedes and there is
    no bos they are NaN and uniform."""
    width = bridge.base.width
    ids = plan.base_ids if models.bos_id is None else np.concatenate([[models.bos_id], plan.base_ids])
    whole = capture(models.base_model, torch.from_numpy(ids)[None]).final[0]
    final = whole[:-1]
    log_p = [models.base_logits(rows).float().log_softmax(-1)[:, :width] for rows in final.split(512)]
    if models.bos_id is None:
        final = torch.cat([torch.full_like(whole[:1], math.nan), final])
        log_p = [torch.full((1, width), -math.log(width), device=final.device), *log_p]
    return final, torch.cat(log_p)
