"""What a bridge is worth: bits per byte over every base position, from the text before it alone, next to what it replaces.

Each window is planned once and the expert run once over its states; every estimator then reads the same logits. Beside them
stand the expert in its own tokens, the base alone, a mixture of both whose weight was fitted on other documents, and, where
asked for, lookahead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from chassis.bridge.bridge import FLOOR, Bridge
from chassis.bridge.lookahead import lookahead
from chassis.bridge.plan import Plan
from chassis.bridge.states import ExpertStates
from chassis.bridge.windows import TextWindow, text_windows
from chassis.errors import BridgeError
from chassis.models import capture
from chassis.text.corpus import Document

WEIGHTS = tuple(round(0.05 * i, 2) for i in range(21))  # of the base in the mixture
MIXTURE = "mixture with the base"


@dataclass
class Tally:
    """Nats over positions; KL and agreement against the reference, where there is one."""

    nats: float = 0.0
    kl: float = 0.0
    agree: int = 0
    compared: int = 0
    mass: float = 0.0
    positions: int = 0
    uncertainty: list[Tensor] = field(default_factory=list)

    def row(self, name: str, n_bytes: int) -> dict:
        """Numbers of one line of the table; bits where the spec of the number is bits."""
        found = {"name": name, "bits_per_byte": self.nats / math.log(2) / n_bytes}
        if self.compared:
            found |= {"kl_bits": self.kl / math.log(2) / self.compared, "top1": self.agree / self.compared}
        if self.positions:
            u = torch.cat(self.uncertainty)
            found |= {"uncertainty": float(u.mean()), "uncertainty_p95": float(u.quantile(0.95))}
            found |= {"unmapped": 1 - self.mass / self.positions}
        return found


@dataclass
class Models:
    """The two models: the base's with its logits, the token that opens its texts, the expert's and its opening token."""

    base_model: torch.nn.Module
    base_logits: Callable[[Tensor], Tensor]  # final states [n, D] -> logits [n, V]
    bos_id: int | None
    expert_model: torch.nn.Module
    start_id: int


@torch.no_grad()
def evaluate(
    models: Models,
    bridges: dict[str, tuple[Bridge, bool]],  # name -> bridge, and whether what cannot follow is blocked
    documents: dict[str, Sequence[Document]],  # "validation" and "test"
    *,
    main: str,
    looks: Sequence[int] = (),
    reference: int = 0,
    window: int = 128,
    max_windows: int | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict:
    """Rows of the ladder for the test documents; `main` is the bridge of the mixture and of lookahead.

    `looks`: evaluations a position for rows of lookahead; `reference`: how many the reference has (0: none), against which
    KL and top-1 are measured at positions where both tokenizations have ended. Raises BridgeError without text.
    """
    bridge = bridges[main][0]
    parts = {split: _windows(bridge, documents[split], window, max_windows) for split in ("validation", "test")}
    mixing = np.zeros(len(WEIGHTS))
    for done, part in enumerate(parts["validation"], 1):
        _, scored, log_q, log_p, ids = _read(models, bridge, part, bridges[main][1])
        for i, weight in enumerate(WEIGHTS):
            mixing[i] += float(_mixed(log_q, log_p, ids, weight)[scored].sum())
        progress("mixture", done, len(parts["validation"]))
    weight = WEIGHTS[int(mixing.argmin())]
    names = [*bridges, *(f"lookahead {m}" for m in looks), MIXTURE, "base alone"]
    tallies = {name: Tally() for name in names}
    own, n_bytes = 0.0, 0
    for done, part in enumerate(parts["test"], 1):
        plan, states, logits = _run(models, bridge, part.text)
        scored = torch.from_numpy(plan.begins >= part.seen)
        n_bytes += part.n_bytes
        own += _own_nats(bridge, plan, logits, part.seen)
        results = {name: one.apply(plan, logits, masked=masked) for name, (one, masked) in bridges.items()}
        results |= {f"lookahead {m}": _look(bridge, plan, models, m, bridges[main][1]) for m in looks}
        truth = _look(bridge, plan, models, reference, True).log_q if reference else None
        aligned = scored & torch.tensor([bool(c) for c in plan.complete])
        log_p = _base_log_probs(models, bridge, plan)
        ids = torch.from_numpy(plan.base_ids)
        for name, result in results.items():
            used = bridges[name][0] if name in bridges else bridge
            _add(tallies[name], used.nll(plan, result), result, scored, truth, aligned)
        tallies[MIXTURE].nats += float(_mixed(_floored(bridge, results[main].log_q), log_p, ids, weight)[scored].sum())
        tallies["base alone"].nats += float(-log_p.gather(1, ids[:, None])[:, 0][scored].double().sum())
        progress("test", done, len(parts["test"]))
    rows = [tallies[name].row(name, n_bytes) for name in names]
    best = {"name": "expert in its own tokens", "bits_per_byte": own / math.log(2) / n_bytes}
    return {
        "rows": [best, *rows],
        "main": main,
        "mixture_weight": weight,
        "test_bytes": n_bytes,
        "test_windows": len(parts["test"]),
        "coverage": bridge.coverage(),
        "passage": _passage(models, bridge, parts["test"][0]),
    }


def _windows(bridge: Bridge, documents: Sequence[Document], length: int, limit: int | None) -> list[TextWindow]:
    """Windows of all documents, or of as many whole documents as give `limit` of them."""
    found: list[TextWindow] = []
    for document in documents:
        found += text_windows(bridge, document.text, length)
        if limit is not None and len(found) >= limit:
            return found[:limit]
    if not found:
        raise BridgeError("no text to evaluate on: give validation and test documents")
    return found


def _run(models: Models, bridge: Bridge, text: str) -> tuple[Plan, ExpertStates, Tensor]:
    plan = bridge.plan(text)
    states = ExpertStates(models.expert_model, models.start_id)
    return plan, states, states.grow(plan.tree.tokens, plan.tree.parent)


def _look(bridge: Bridge, plan: Plan, models: Models, evaluations: int, masked: bool):
    states = ExpertStates(models.expert_model, models.start_id)
    logits = states.grow(plan.tree.tokens, plan.tree.parent)
    return lookahead(bridge, plan, states, logits, evaluations, masked=masked)


def _read(models: Models, bridge: Bridge, part: TextWindow, masked: bool):
    plan, _, logits = _run(models, bridge, part.text)
    log_q = _floored(bridge, bridge.apply(plan, logits, masked=masked).log_q)
    scored = torch.from_numpy(plan.begins >= part.seen)
    return plan, scored, log_q, _base_log_probs(models, bridge, plan), torch.from_numpy(plan.base_ids)


def _floored(bridge: Bridge, log_q: Tensor) -> Tensor:
    return ((1 - FLOOR) * log_q.exp() + FLOOR * bridge.unigram.to(log_q)).log()


def _mixed(log_q: Tensor, log_p: Tensor, ids: Tensor, weight: float) -> Tensor:
    """Nats of the tokens [n] under (1 - weight) q + weight p."""
    q, p = (x.gather(1, ids[:, None])[:, 0].double().exp() for x in (log_q, log_p))
    return -((1 - weight) * q + weight * p).log()


def _base_log_probs(models: Models, bridge: Bridge, plan: Plan) -> Tensor:
    """The base's own log-probabilities [n, V] at a plan's positions; uniform where nothing precedes and it has no bos."""
    width = bridge.base.width
    ids = plan.base_ids if models.bos_id is None else np.concatenate([[models.bos_id], plan.base_ids])
    final = capture(models.base_model, torch.from_numpy(ids)[None]).final[0]
    log_p = torch.cat([models.base_logits(rows).float().log_softmax(-1)[:, :width] for rows in final[:-1].split(512)])
    if models.bos_id is None:
        log_p = torch.cat([torch.full_like(log_p[:1], -math.log(width)), log_p])
    return log_p


def _own_nats(bridge: Bridge, plan: Plan, logits: Tensor, seen: int) -> float:
    """Nats of the expert's own tokens that begin at `seen` or after, by the same logits."""
    tree = plan.tree
    nodes = torch.arange(1, tree.n_trunk + 1)
    tokens, parents = torch.from_numpy(tree.tokens)[nodes], torch.from_numpy(tree.parent)[nodes]
    begins = torch.from_numpy(np.concatenate([[0], np.cumsum(bridge.expert.lengths[plan.expert_ids])[:-1]]))
    log_p = logits[parents][:, : bridge.expert.width].float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return float(-log_p[begins >= seen].double().sum())


def _add(tally: Tally, nll: Tensor, result, scored: Tensor, truth: Tensor | None, aligned: Tensor) -> None:
    tally.nats += float(nll[scored].sum())
    tally.mass += float(result.mass[scored].sum())
    tally.uncertainty.append(result.uncertainty[scored].float())
    tally.positions += int(scored.sum())
    if truth is not None and aligned.any():
        q, r = truth[aligned].double(), result.log_q[aligned].double()
        r = ((1 - FLOOR) * r.exp() + FLOOR / r.shape[1]).log()
        tally.kl += float(torch.where(q > -torch.inf, q.exp() * (q - r), 0.0).sum())
        tally.agree += int((q.argmax(1) == r.argmax(1)).sum())
        tally.compared += int(aligned.sum())


def _passage(models: Models, bridge: Bridge, part: TextWindow) -> dict:
    """One window token by token: bits of bridge and base, uncertainty."""
    plan, _, log_q, log_p, ids = _read(models, bridge, part, True)
    plan, _, logits = _run(models, bridge, part.text)
    u = bridge.apply(plan, logits).uncertainty.tolist()
    bits = [(-x.gather(1, ids[:, None])[:, 0] / math.log(2)).tolist() for x in (log_q, log_p)]
    texts = [bridge.base.bytes[i].decode(errors="replace") for i in plan.base_ids.tolist()]
    tokens = zip(texts, *bits, u, strict=True)
    return {"tokens": [{"text": t, "bridge_bits": b, "base_bits": a, "uncertainty": v} for t, b, a, v in tokens]}
