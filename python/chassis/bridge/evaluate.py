"""What a bridge is worth: bits per byte over every base position, from the text before it alone, next to what it replaces.

Each window is planned once and the expert run once over its states; every estimator then reads the same logits. Beside them
stand the expert in its own tokens, the base alone, a mixture of both whose weight was fitted on other documents, and, where
asked for, lookahead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from chassis.bridge.bridge import FLOOR, Bridge
from chassis.bridge.lookahead import lookaheads
from chassis.bridge.plan import Plan
from chassis.bridge.reading import Models, Reading, read
from chassis.bridge.semantic import OnOpenMass, SemanticHead
from chassis.bridge.states import ExpertStates
from chassis.bridge.windows import TextWindow, text_windows
from chassis.errors import BridgeError
from chassis.text.corpus import Document
from chassis_kernels.bridge_project import Bridged

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
            found["unmapped"] = max(0.0, 1 - self.mass / self.positions)
            if not u.isnan().any():
                found |= {"uncertainty": float(u.mean()), "uncertainty_p95": float(u.quantile(0.95))}
        return found


@torch.no_grad()
def evaluate(
    models: Models,
    bridges: dict[str, tuple[Bridge, bool]],  # name -> bridge, and whether what cannot follow is blocked
    documents: dict[str, Sequence[Document]],  # "validation" and "test"
    *,
    main: str,
    looks: Sequence[int] = (),
    reference: int = 0,
    heads: Mapping[str, SemanticHead | OnOpenMass] | None = None,
    window: int = 128,
    max_windows: int | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict:
    """Rows of the ladder for the test documents; `main` is the bridge of the mixture and of lookahead.

    `looks`: evaluations a position for rows of lookahead; `reference`: how many the reference has (0: none), against which
    KL and top-1 are measured at positions where both tokenizations have ended. `heads`: semantic heads to score beside the
    bridges. Raises BridgeError without text.
    """
    bridge, masked = bridges[main]
    heads = heads or {}
    parts = {split: windows(bridge, documents[split], window, max_windows) for split in ("validation", "test")}
    mixing = np.zeros(len(WEIGHTS))
    for done, part in enumerate(parts["validation"], 1):
        reading = read(models, bridge, part)
        log_q = bridge.floored(bridge.apply(reading.plan, reading.logits, masked=masked).log_q)
        mixing += [float(_mixed(reading, log_q, weight)[reading.scored].sum()) for weight in WEIGHTS]
        progress("mixture", done, len(parts["validation"]))
    weight = WEIGHTS[int(mixing.argmin())]
    names = [*bridges, *heads, *(f"lookahead {m}" for m in looks), MIXTURE, "base alone"]
    tallies = {name: Tally() for name in names}
    budgets = sorted({*looks, *([reference] if reference else [])})
    own, n_bytes, passage = 0.0, 0, None
    for done, part in enumerate(parts["test"], 1):
        reading = read(models, bridge, part)
        plan, scored = reading.plan, reading.scored
        n_bytes += part.n_bytes
        own_nats = _own_nats(bridge, reading)
        own += float(own_nats[torch.from_numpy(_begins(bridge, plan) >= part.seen)].sum())
        results = {name: _apply(one, reading, blocking) for name, (one, blocking) in bridges.items()}
        results |= {name: head.apply(bridge, reading, masked=masked) for name, head in heads.items()}
        looked = dict(zip(budgets, _look(bridge, plan, models, budgets, masked), strict=True))
        results |= {f"lookahead {m}": looked[m] for m in looks}
        truth = looked[reference].log_q if reference else None
        aligned = scored & torch.tensor([bool(c) for c in plan.complete])
        for name, result in results.items():
            used = bridges[name][0] if name in bridges else bridge
            _add(tallies[name], used.nll(plan, result), result, scored)
            if truth is not None:
                _compare(tallies[name], truth[aligned], result.log_q[aligned])
        log_q, log_p = bridge.floored(results[main].log_q), reading.log_p
        tallies[MIXTURE].nats += float(_mixed(reading, log_q, weight)[scored].sum())
        tallies["base alone"].nats -= float(reading.chosen(log_p)[scored].sum())
        if truth is not None:
            _compare(tallies[MIXTURE], truth[aligned], ((1 - weight) * log_q.exp() + weight * log_p.exp()).log()[aligned])
            _compare(tallies["base alone"], truth[aligned], log_p[aligned])
        passage = passage or _passage(bridge, reading, results[main], own_nats)
        progress("test", done, len(parts["test"]))
    rows = [tallies[name].row(name, n_bytes) for name in names]
    best = {"name": "expert in its own tokens", "bits_per_byte": own / math.log(2) / n_bytes}
    return {
        "rows": [best, *rows],
        "main": main,
        "mixture_weight": weight,
        "reference": reference,
        "test_bytes": n_bytes,
        "test_windows": len(parts["test"]),
        "coverage": bridge.coverage(),
        "passage": passage,
    }


def windows(bridge: Bridge, documents: Sequence[Document], length: int, limit: int | None) -> list[TextWindow]:
    """Windows of all documents, or of as many whole documents as give `limit` of them."""
    found: list[TextWindow] = []
    for document in documents:
        found += text_windows(bridge, document.text, length)
        if limit is not None and len(found) >= limit:
            return found[:limit]
    if not found:
        raise BridgeError("no text to evaluate on: give validation and test documents")
    return found


def _apply(bridge: Bridge, reading: Reading, masked: bool) -> Bridged:
    log_p = reading.log_p if bridge.asks_base else None
    return bridge.apply(reading.plan, reading.logits, base_log_probs=log_p, masked=masked)


def _look(bridge: Bridge, plan: Plan, models: Models, budgets: Sequence[int], masked: bool) -> list[Bridged]:
    if not budgets:
        return []
    states = ExpertStates(models.expert_model, models.start_id)
    logits = states.grow(plan.tree.tokens, plan.tree.parent)
    return lookaheads(bridge, plan, states, logits, budgets, masked=masked)


def _mixed(reading: Reading, log_q: Tensor, weight: float) -> Tensor:
    """Nats of the tokens [n] under (1 - weight) q + weight p."""
    q, p = (reading.chosen(x).exp() for x in (log_q, reading.log_p))
    return -((1 - weight) * q + weight * p).log()


def _own_nats(bridge: Bridge, reading: Reading) -> Tensor:
    """Nats [n_trunk] of the expert's own tokens, by the same logits."""
    tree = reading.plan.tree
    nodes = torch.arange(1, tree.n_trunk + 1)
    tokens, parents = torch.from_numpy(tree.tokens)[nodes], torch.from_numpy(tree.parent)[nodes]
    log_p = reading.logits[parents][:, : bridge.expert.width].float().log_softmax(-1)
    return -log_p.gather(1, tokens[:, None])[:, 0].double()


def _add(tally: Tally, nll: Tensor, result: Bridged, scored: Tensor) -> None:
    tally.nats += float(nll[scored].sum())
    tally.mass += float(result.mass[scored].sum())
    tally.uncertainty.append(result.uncertainty[scored].float())
    tally.positions += int(scored.sum())


def _compare(tally: Tally, truth: Tensor, log_q: Tensor) -> None:
    """Add KL and agreement of log_q [n, V] with the reference."""
    p, q = truth.double(), log_q.double()
    q = ((1 - FLOOR) * q.exp() + FLOOR / q.shape[1]).log()
    tally.kl += float(torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum())
    tally.agree += int((p.argmax(1) == q.argmax(1)).sum())
    tally.compared += len(p)


def _begins(bridge: Bridge, plan: Plan) -> np.ndarray:
    """Bytes [n_trunk] at which the expert's own tokens begin."""
    if bridge.expert.is_text[plan.expert_ids].all():
        lengths = bridge.expert.lengths[plan.expert_ids]
        return lengths.cumsum() - lengths
    return np.append(0, bridge.expert.encode(plan.data.decode()).ends[:-1])  # an unknown token has no bytes of its own


def _passage(bridge: Bridge, reading: Reading, result: Bridged, own_nats: Tensor) -> dict:
    """One window token by token: bits of the expert in the base's tokens and in its own, of the base; uncertainty."""
    bits = [(nats / math.log(2)).tolist() for nats in (bridge.nll(reading.plan, result), -reading.chosen(reading.log_p))]
    ours, theirs = (
        [tokens.bytes[i].decode(errors="replace") for i in ids.tolist()]
        for tokens, ids in ((bridge.base, reading.plan.base_ids), (bridge.expert, reading.plan.expert_ids))
    )
    tokens = zip(ours, *bits, result.uncertainty.tolist(), strict=True)
    own = zip(theirs, (own_nats / math.log(2)).tolist(), strict=True)
    return {
        "tokens": [{"text": t, "bridge_bits": b, "base_bits": a, "uncertainty": v} for t, b, a, v in tokens],
        "expert_tokens": [{"text": t, "expert_bits": b} for t, b in own],
    }
