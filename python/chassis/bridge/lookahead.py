"""More exact probabilities for more evaluations of the expert: the heaviest open hypotheses are followed by a token.

One pass leaves the mass w of a token t (or of what remains of one under way) to row M[t]. Where M[t] is spread over several
base tokens, the expert itself can tell: its next-token distribution after t splits w among longer strings s_t s_t', each of
which fixes the base token better,

    w M[t]   →   Σ_t' w P(t' | x t) L(s_t s_t')

L of a string is its row in the table where it has one, else the first token of the base's encoding. Pairs (t, t') that
cannot stand side by side are left out. `evaluations` are spent on each position, in rounds, the largest w · spread first.
What is chosen in a round does not depend on how many are left, so that one growth holds every smaller one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from chassis.bridge.apply import States
from chassis.bridge.bridge import Bridge
from chassis.bridge.plan import Plan, first_piece
from chassis.bridge.rules import first_tokens
from chassis.bridge.states import ExpertStates
from chassis_kernels.bridge_project import Bridged

CHILDREN = 256  # next tokens followed apart; the rest stays with the row of its beginning
FIRST = 64  # hypotheses of one state that are kept to be followed
OPEN = 1e-5  # mass times spread below which a hypothesis is not followed
KEPT = 1_000_000  # strings whose endings are kept
CELLS = 8_000_000  # probabilities of new states at hand at once


@dataclass(eq=False)
class Leaves:
    """Hypotheses, all arrays [n]: at `position` the expert is in `node` and says `token`; `text` has come since, with
    probability `mass`; L of the text is `ending`, an index into the Finisher's arrays."""

    position: np.ndarray
    mass: np.ndarray
    node: np.ndarray
    token: np.ndarray
    text: np.ndarray  # of bytes
    ending: np.ndarray

    def __len__(self) -> int:
        return len(self.mass)

    def take(self, which: np.ndarray) -> Leaves:
        return Leaves(*(getattr(self, field.name)[which] for field in fields(self)))

    @classmethod
    def join(cls, parts: list[Leaves]) -> Leaves:
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


class Finisher:
    """L: `begin`, `size` and `spread` [endings] of the base tokens `ids` and their `shares`, and how open they leave it.

    An ending is a row of the table, or, behind them, a base token that may go on or one that may not.
    """

    def __init__(self, bridge: Bridge) -> None:
        table, self.base = bridge.table, bridge.base
        self.n_rows, n_base = table.shape
        self._ending = {text: row for row, text in reversed(list(enumerate(bridge.leaves.strings))) if text}
        self._n_row_texts = len(self._ending)
        token = np.arange(n_base)
        self.ids = np.concatenate([table.ids.numpy(), token])
        self.shares = np.concatenate([table.weights.double().numpy(), np.ones(n_base)])
        single = np.append(len(table.ids) + token, 0)  # the last: no base token at all
        self.begin = np.concatenate([table.start.numpy()[:-1], single, single])
        self.size = np.concatenate([table.start.diff().numpy(), *[np.append(np.ones(n_base, dtype=np.int64), 0)] * 2])
        # Only where a longer base token begins with the text is there something to learn by going on.
        self.spread = np.concatenate([table.spread.double().numpy(), *np.repeat([[0.05], [0.5]], n_base + 1, axis=1)])
        self._cut = all(first_piece(data) == data for data in bridge.base.ids_by_bytes)  # no token goes on into a next piece
        self._beginnings = {data[:end] for data in bridge.base.ids_by_bytes for end in range(1, len(data) + 1)}

    def endings(self, texts: list[bytes]) -> np.ndarray:
        """The ending [n] of each text."""
        missing = list({text for text in texts if text not in self._ending})
        if missing:
            pieces = [first_piece(text) for text in missing] if self._cut else missing
            unique = list(dict.fromkeys(pieces))
            first = dict(zip(unique, first_tokens(self.base, unique).tolist(), strict=True))
            none = self.base.width
            for text, piece in zip(missing, pieces, strict=True):
                token = first[piece] if first[piece] >= 0 else none
                self._ending[text] = self.n_rows + token + (none + 1) * (text in self._beginnings)
        found = np.fromiter(map(self._ending.__getitem__, texts), np.int64, len(texts))
        if len(self._ending) > self._n_row_texts + KEPT:
            self._ending = dict(list(self._ending.items())[: self._n_row_texts])
        return found

    def add(self, q: np.ndarray, position: np.ndarray, ending: np.ndarray, mass: np.ndarray) -> None:
        """q [positions, V_B] with `mass` [n] shared out as each ending says."""
        size = self.size[ending]
        of = np.repeat(np.arange(len(ending)), size)
        place = np.arange(len(of)) - (size.cumsum() - size - self.begin[ending])[of]
        np.add.at(q.reshape(-1), position[of] * q.shape[1] + self.ids[place], mass[of] * self.shares[place])


_finishers: WeakKeyDictionary[Bridge, Finisher] = WeakKeyDictionary()


def lookahead(
    bridge: Bridge, plan: Plan, states: ExpertStates, logits: Tensor, evaluations: int, *, masked: bool = True
) -> Bridged:
    """`bridge.apply` with `evaluations` more states of the expert for each position.

    `states` has been grown over plan.tree, with `logits` [n_nodes, V_E] as the result; it is grown on.
    """
    return lookaheads(bridge, plan, states, logits, [evaluations], masked=masked)[0]


def lookaheads(
    bridge: Bridge, plan: Plan, states: ExpertStates, logits: Tensor, budgets: Sequence[int], *, masked: bool = True
) -> list[Bridged]:
    """`lookahead` for each of `budgets` evaluations, all read off the growth of the largest."""
    result = bridge.apply(plan, logits, masked=False)
    budgets, numbers = np.unique(np.maximum(budgets, 0), return_inverse=True)
    if bridge.identical or not budgets.any() or not len(plan):
        return [bridge.apply(plan, logits, masked=masked)] * len(numbers)
    if bridge not in _finishers:
        _finishers[bridge] = Finisher(bridge)
    finisher, n = _finishers[bridge], len(plan)
    # Row i * n + position: what is added by the evaluations that budget i has and budget i - 1 has not.
    q = np.zeros((len(budgets) * n, bridge.base.width))
    q[:n] = result.log_q.double().exp().cpu().numpy()
    open_mass = np.zeros(len(q))
    open_mass[:n] = result.uncertainty.double().cpu().numpy()
    frontier = _first_leaves(States(plan, logits, bridge.under_way, bridge.padding), finisher)
    for done, end in _rounds(int(budgets[-1])):
        order, rank = _by_weight(frontier, finisher)
        now = rank < end - done
        chosen, nth = frontier.take(order[now]), done + rank[now]
        if not len(chosen):
            break
        # No more than what is left to spend will be chosen of the rest.
        frontier = frontier.take(order[~now & (rank < budgets[-1] - done)])
        chosen = replace(chosen, position=chosen.position + n * np.searchsorted(budgets, nth, side="right"))
        keys = dict.fromkeys(zip(chosen.node.tolist(), chosen.token.tolist(), strict=True))
        number = {key: i for i, key in enumerate(keys)}
        which = np.array([number[key] for key in zip(chosen.node.tolist(), chosen.token.tolist(), strict=True)])
        parent, token = (np.array(column, dtype=np.int64) for column in zip(*keys, strict=True))
        first = len(states)
        following = states.grow(token, parent)
        finisher.add(q, chosen.position, chosen.ending, -chosen.mass)
        np.subtract.at(open_mass, chosen.position, chosen.mass * finisher.spread[chosen.ending])
        step = max(1, CELLS // bridge.expert.width)
        for begin in range(0, len(keys), step):
            tokens, p = _children(bridge, token[begin : begin + step], following[begin : begin + step])
            mine = np.flatnonzero((which >= begin) & (which < begin + step))
            grown = _grow_leaves(bridge, finisher, chosen.take(mine), which[mine] - begin, first + begin, tokens, p, q)
            opens = grown.mass * finisher.spread[grown.ending]
            np.add.at(open_mass, grown.position, opens)
            grown.position %= n
            frontier = Leaves.join([frontier, grown.take(opens > OPEN)])
    q, open_mass = q.reshape(len(budgets), n, -1).cumsum(0), open_mass.reshape(len(budgets), n).cumsum(0)
    found = [_finish(bridge, plan, *map(torch.from_numpy, pair), result, masked) for pair in zip(q, open_mass, strict=True)]
    return [found[i] for i in numbers]


def _rounds(evaluations: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each round: as many evaluations as there were before it, cut where `evaluations` are spent."""
    done = 0
    while done < evaluations:
        end = min(max(1, 2 * done), evaluations)
        yield done, end
        done = end


def _first_leaves(known: States, finisher: Finisher) -> Leaves:
    """The open hypotheses of one pass."""
    strings, parts = known.under_way.leaves.strings, []

    def add(position: int, node: int, p: np.ndarray, tokens: np.ndarray, rows: np.ndarray) -> None:
        opens = p * finisher.spread[rows]
        best = np.argpartition(-opens, FIRST)[:FIRST] if len(opens) > FIRST else np.arange(len(opens))
        best = best[opens[best] > OPEN]
        texts = np.empty(len(best), dtype=object)
        texts[:] = [strings[row] for row in rows[best].tolist()]
        parts.append(
            Leaves(np.full(len(best), position), p[best], np.full(len(best), node), tokens[best], texts, rows[best])
        )

    everything = np.arange(known.logits.shape[1])
    for position in range(len(known.plan)):
        mixture = known.mixture(position)
        for node, share in zip(mixture.complete.tolist(), mixture.shares.tolist(), strict=True):
            p = np.exp((known.logits[node].float() - known.lse[node]).double().cpu().numpy() + share)
            add(position, node, p, everything, everything)
        begin = 0
        for node, begun in known.plan.under_way[position]:
            tokens, rows = known.under_way.after(int(known.plan.tree.tokens[node]), begun)
            add(position, node, np.exp(mixture.logs[begin : begin + len(tokens)]), tokens, rows)
            begin += len(tokens)
    return Leaves.join(parts)


def _by_weight(leaves: Leaves, finisher: Finisher) -> tuple[np.ndarray, np.ndarray]:
    """The leaves by position, the most open first, and the rank of each at its position."""
    order = np.lexsort((-leaves.mass * finisher.spread[leaves.ending], leaves.position))
    position = leaves.position[order]
    return order, np.arange(len(order)) - np.searchsorted(position, position)


def _children(bridge: Bridge, token: np.ndarray, logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest next tokens after `token` [n], and their probabilities among those that can follow it, [n, CHILDREN]."""
    logits = logits[:, : bridge.expert.width].float()
    if bridge.padding is not None:
        logits = logits.masked_fill(bridge.padding.to(logits.device), -torch.inf)
    p = torch.log_softmax(logits, 1).double().exp().cpu()
    p[torch.from_numpy(bridge.under_way.mask.rows(token.tolist()))] = 0
    best = (p / p.sum(1, keepdim=True)).topk(min(CHILDREN, p.shape[1]), dim=1)
    return best.indices.numpy(), best.values.numpy()


def _grow_leaves(
    bridge: Bridge, finisher: Finisher, chosen: Leaves, which: np.ndarray, first: int, tokens: np.ndarray, p: np.ndarray, q
) -> Leaves:
    """What `chosen` become when the expert's next token is known, their mass shared out and added to q.

    The states behind them are numbered from `first`, `which` [n] tells the row of each in `tokens` and `p`.
    """
    is_text, data = bridge.expert.is_text[tokens], bridge.expert.bytes
    parent, column = np.nonzero((is_text & (p > 0))[which])
    token = tokens[which[parent], column]
    texts = np.empty(len(parent), dtype=object)
    texts[:] = [text + data[i] for text, i in zip(chosen.text[parent].tolist(), token.tolist(), strict=True)]
    mass, position = chosen.mass[parent] * p[which[parent], column], chosen.position[parent]
    grown = Leaves(position, mass, first + which[parent], token, texts, finisher.endings(texts.tolist()))
    finisher.add(q, grown.position, grown.ending, grown.mass)
    # After a special token nothing more comes: the base's encoding ends with the text there is.
    ended = np.where(is_text, 0.0, p).sum(1)[which]
    special = np.flatnonzero(ended > 0)
    stop = finisher.endings([text + b"\x00" for text in chosen.text[special].tolist()])
    finisher.add(q, chosen.position[special], stop, (chosen.mass * ended)[special])
    rest = np.maximum(1 - p.sum(1)[which], 0.0)
    finisher.add(q, chosen.position, chosen.ending, chosen.mass * rest)
    return grown


def _finish(bridge: Bridge, plan: Plan, q: Tensor, uncertainty: Tensor, result: Bridged, masked: bool) -> Bridged:
    q = q.clamp_min(0)
    if masked:
        for position, previous in enumerate([-1, *plan.base_ids[:-1].tolist()]):
            if previous >= 0:
                q[position, torch.from_numpy(bridge.mask.blocked_after(previous)).long()] = 0
    q = q / q.sum(1, keepdim=True)
    like = result.log_q
    return Bridged(q.log().to(like), result.mass, uncertainty.clamp(0, 1).to(like))
