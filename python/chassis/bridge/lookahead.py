"""More exact probabilities for more evaluations of the expert: the heaviest open hypotheses are followed by a token.

One pass leaves the mass w of a token t (or of what remains of one under way) to row M[t]. Where M[t] is spread over several
base tokens, the expert itself can tell: its next-token distribution after t splits w among longer strings s_t s_t', each of
which fixes the base token better,

    w M[t]   →   Σ_t' w P(t' | x t) L(s_t s_t')

L of a string is its row in the table where it has one, else the first token of the base's encoding. Pairs (t, t') that
cannot stand side by side are left out. `evaluations` are spent on each position, in rounds, the largest w · spread first.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chassis.bridge.apply import States
from chassis.bridge.bridge import Bridge
from chassis.bridge.leaves import prefix_range
from chassis.bridge.plan import Plan
from chassis.bridge.rules import first_tokens
from chassis.bridge.states import ExpertStates
from chassis_kernels.bridge_project import Bridged

CHILDREN = 256  # next tokens followed apart; the rest stays with the row of its beginning
ROUNDS = 4


@dataclass(frozen=True, eq=False)
class Finish:
    """L of a string: base tokens with their shares, and how open it leaves the base token."""

    ids: np.ndarray
    shares: np.ndarray
    spread: float


@dataclass(frozen=True, eq=False)
class Leaf:
    """A hypothesis: the expert is in `node` and says `token`; since the position came `text`, with probability `mass`."""

    mass: float
    node: int
    token: int
    text: bytes
    finish: Finish

    @property
    def open(self) -> float:
        return self.mass * self.finish.spread


class Finisher:
    """`finish(text)`, kept once found."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        leaves, table = bridge.leaves, bridge.table
        self.row_of = {text: row for row, text in reversed(list(enumerate(leaves.strings))) if text}
        self.start, self.ids, self.weights = table.start.numpy(), table.ids.numpy(), table.weights.double().numpy()
        self.spread = table.spread.double().numpy()
        self._sorted = sorted(bridge.base.ids_by_bytes)
        self._known: dict[bytes, Finish] = {}

    def row(self, row: int) -> Finish:
        span = slice(self.start[row], self.start[row + 1])
        return Finish(self.ids[span], self.weights[span], float(self.spread[row]))

    def finish(self, texts: list[bytes]) -> list[Finish]:
        missing = list(dict.fromkeys(text for text in texts if text not in self._known))
        unknown = [text for text in missing if text not in self.row_of]
        self._known |= {text: self.row(self.row_of[text]) for text in missing if text in self.row_of}
        for text, first in zip(unknown, first_tokens(self.bridge.base, unknown).tolist(), strict=True):
            low, high = prefix_range(self._sorted, text)
            ids = np.array([first] if first >= 0 else [], dtype=np.int64)
            # Only where a longer base token begins with the text is there something to learn by going on.
            self._known[text] = Finish(ids, np.ones(len(ids)), 0.5 if low < high else 0.05)
        return [self._known[text] for text in texts]


def lookahead(
    bridge: Bridge, plan: Plan, states: ExpertStates, logits: Tensor, evaluations: int, *, masked: bool = True
) -> Bridged:
    """`bridge.apply` with `evaluations` more states of the expert for each position.

    `states` has been grown over plan.tree, with `logits` [n_nodes, V_E] as the result; it is grown on.
    """
    result = bridge.apply(plan, logits, masked=False)
    if bridge.identical or evaluations < 1 or not len(plan):
        return bridge.apply(plan, logits, masked=masked)
    finisher = Finisher(bridge)
    known = States(plan, logits, bridge.under_way, bridge.padding)
    q = result.log_q.double().exp().cpu().numpy()
    open_mass = result.uncertainty.double().cpu().numpy().copy()
    frontier = [_first_leaves(known, finisher, position) for position in range(len(plan))]
    tokens_at = {node: int(token) for node, token in enumerate(plan.tree.tokens)}
    done, rounds = 0, min(ROUNDS, evaluations)
    for turn in range(rounds):
        share = evaluations * (turn + 1) // rounds - done
        done += share
        chosen = [(p, leaf) for p, heap in enumerate(frontier) for leaf in _heaviest(heap, share)]
        if not chosen:
            break
        keys = list(dict.fromkeys((leaf.node, leaf.token) for _, leaf in chosen))
        first = len(states)
        parent, token = (np.array(column, dtype=np.int64) for column in zip(*keys, strict=True))
        following = states.grow(token, parent)
        number = {key: first + i for i, key in enumerate(keys)}
        tokens_at |= {number[key]: key[1] for key in keys}
        log_p = _log_p(following, bridge)
        for position, leaf in chosen:
            node = number[leaf.node, leaf.token]
            children = _children(bridge, finisher, leaf, node, log_p[node - first])
            _move(q[position], leaf, children)
            open_mass[position] += sum(child.open for child in children) - leaf.open
            for child in children:
                if child.open > 1e-5:
                    heapq.heappush(frontier[position], (-child.open, id(child), child))
    return _finish(bridge, plan, torch.from_numpy(q), result, torch.from_numpy(open_mass), masked)


def _first_leaves(known: States, finisher: Finisher, position: int) -> list[tuple[float, int, Leaf]]:
    """The open hypotheses of one pass, as a heap."""
    leaves = known.under_way.leaves
    mixture = known.mixture(position)
    heap = []
    for node, share in zip(mixture.complete.tolist(), mixture.shares.tolist(), strict=True):
        p = np.exp((known.logits[node].float() - known.lse[node]).double().cpu().numpy() + share)
        opens = p * finisher.spread[: len(p)]
        for token in np.argsort(-opens)[:64].tolist():
            if opens[token] > 1e-5:
                leaf = Leaf(float(p[token]), node, token, leaves.strings[token], finisher.row(token))
                heap.append((-leaf.open, id(leaf), leaf))
    begin = 0
    for node, begun in known.plan.under_way[position]:
        tokens, rows = known.under_way.after(int(known.plan.tree.tokens[node]), begun)
        p = np.exp(mixture.logs[begin : begin + len(tokens)])
        begin += len(tokens)
        opens = p * finisher.spread[rows]
        for i in np.argsort(-opens)[:64].tolist():
            if opens[i] > 1e-5:
                row = int(rows[i])
                leaf = Leaf(float(p[i]), node, int(tokens[i]), leaves.strings[row], finisher.row(row))
                heap.append((-leaf.open, id(leaf), leaf))
    heapq.heapify(heap)
    return heap


def _heaviest(heap: list, n: int) -> list[Leaf]:
    return [heapq.heappop(heap)[2] for _ in range(min(n, len(heap)))]


def _log_p(logits: Tensor, bridge: Bridge) -> Tensor:
    logits = logits[:, : bridge.expert.width].float()
    if bridge.padding is not None:
        logits = logits.masked_fill(bridge.padding.to(logits.device), -torch.inf)
    return torch.log_softmax(logits, 1)


def _children(bridge: Bridge, finisher: Finisher, leaf: Leaf, node: int, log_p: Tensor) -> list[Leaf]:
    """What `leaf` becomes when the expert's next token is known: its mass, shared out."""
    p = log_p.double().exp().cpu().numpy()
    p[bridge.under_way.mask.blocked_after(leaf.token)] = 0
    p /= p.sum()
    chosen = np.argsort(-p)[:CHILDREN]
    special = np.flatnonzero(~bridge.expert.is_text)
    texts = [leaf.text + bridge.expert.bytes[token] for token in chosen.tolist()]
    finishes = finisher.finish(texts)
    children = [
        Leaf(leaf.mass * p[token], node, token, text, finish)
        for token, text, finish in zip(chosen.tolist(), texts, finishes, strict=True)
        if token not in special and p[token] > 0
    ]
    # After a special token nothing more comes: the base's encoding ends with the text there is.
    ended = float(p[np.intersect1d(special, chosen)].sum())
    if ended > 0:
        (stop,) = finisher.finish([leaf.text + b"\x00"])
        children.append(Leaf(leaf.mass * ended, node, -1, leaf.text, Finish(stop.ids, stop.shares, 0.0)))
    rest = 1 - sum(child.mass for child in children) / leaf.mass
    children.append(Leaf(leaf.mass * max(rest, 0.0), node, -1, leaf.text, Finish(leaf.finish.ids, leaf.finish.shares, 0.0)))
    return children


def _move(q: np.ndarray, leaf: Leaf, children: list[Leaf]) -> None:
    q[leaf.finish.ids] -= leaf.mass * leaf.finish.shares
    ids = np.concatenate([child.finish.ids for child in children])
    np.add.at(q, ids, np.concatenate([child.mass * child.finish.shares for child in children]))


def _finish(bridge: Bridge, plan: Plan, q: Tensor, result: Bridged, uncertainty: Tensor, masked: bool) -> Bridged:
    q = q.clamp_min(0)
    if masked:
        for position, previous in enumerate([-1, *plan.base_ids[:-1].tolist()]):
            if previous >= 0:
                q[position, torch.from_numpy(bridge.mask.blocked_after(previous)).long()] = 0
    q = q / q.sum(1, keepdim=True)
    like = result.log_q
    return Bridged(q.log().to(like), result.mass, uncertainty.clamp(0, 1).to(like))
