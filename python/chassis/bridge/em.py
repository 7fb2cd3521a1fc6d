"""A table by maximum likelihood: from what the expert says where a base token begins, and which token begins there.

    maximise  Σ_n log (P_nᵀ M)_{b_n} + κ Σ_r T_r · log M_r    over row-stochastic M, zero where bytes do not fit

P_n is over tokens and residuals, b_n the base token, T the table one starts from, which counts as κ places in every row. The
objective is concave. The multiplicative update

    M[r, b]  ←  (A[r, b] + κ T[r, b]) / row sum,        A[r, b] = Σ_{n: b_n = b} P_n(r) M[r, b] / (P_nᵀ M)_b

never lowers it. Only the entries of column b_n that fit count at place n, so these are all that is kept of a forward pass.

Source: expectation-maximisation of mixing proportions (Dempster, Laird & Rubin 1977).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from chassis.bridge.apply import States
from chassis.bridge.bridge import Bridge
from chassis.bridge.leaves import Leaves, prefix_range
from chassis.bridge.plan import Plan
from chassis.bridge.row_probabilities import row_probabilities
from chassis.bridge.windows import text_windows
from chassis.errors import BridgeError
from chassis.text.token_bytes import TokenBytes
from chassis_kernels import BridgeTable

LEAST = 1e-6  # of P_n(r); less is not kept
SPREAD = 0.1  # of every row of the start is spread evenly over what fits and was seen: what is 0 stays 0
PRIOR = 100.0  # κ; with less, rows learn at rare places what the canonical mask says better
POSITIONS = 60_000
ENOUGH = 1e-4  # nats a place that the last update gained


class Support:
    """`rows_of(b)`: rows whose bytes begin with those of base token b, or the other way round."""

    def __init__(self, leaves: Leaves, base: TokenBytes) -> None:
        self.base = base
        texts = sorted((data, row) for row, data in enumerate(leaves.strings) if data)
        self._sorted, self._order = [data for data, _ in texts], np.array([row for _, row in texts], dtype=np.int64)
        self._known: dict[int, np.ndarray] = {}

    def rows_of(self, token: int) -> np.ndarray:
        if token not in self._known:
            data = self.base.bytes[token]
            spans = [prefix_range(self._sorted, data)]
            for end in range(1, len(data)):
                spans.append(tuple(side(self._sorted, data[:end]) for side in (bisect_left, bisect_right)))
            self._known[token] = np.concatenate([self._order[low:high] for low, high in spans])
        return self._known[token]


@dataclass
class Batch:
    """Places of one text: entries (row · V_B + b_n, P_n(row)), those of place n from start[n] to start[n + 1]."""

    start: np.ndarray
    keys: np.ndarray
    p: np.ndarray


@dataclass
class Evidence:
    """What was seen of the expert, place by place."""

    support: Support
    n_rows: int
    batches: list[Batch] = field(default_factory=list)
    n_positions: int = 0

    def add(self, states: States, seen: int = 0) -> None:
        """Add the positions of a plan that begin at byte `seen` or after, but for those the expert holds impossible."""
        ids, width = states.plan.base_ids, self.support.base.width
        keys, values, lengths = [], [], []
        for tile, P in row_probabilities(states, self.n_rows):
            P = P.cpu().numpy()
            for p, token, begin in zip(P, ids[tile].tolist(), states.plan.begins[tile].tolist(), strict=True):
                if begin < seen:
                    continue
                rows = self.support.rows_of(token)
                rows = rows[p[rows] >= LEAST]
                keys.append(rows * width + token), values.append(p[rows]), lengths.append(len(rows))
        if sum(lengths):
            start = np.concatenate([[0], np.cumsum([n for n in lengths if n])])
            self.batches.append(Batch(start, np.concatenate(keys), np.concatenate(values)))
            self.n_positions += len(start) - 1


def maximise(
    evidence: Evidence, start: BridgeTable, *, prior: float = PRIOR, iterations: int = 50
) -> tuple[BridgeTable, list[float]]:
    """The table after at most `iterations` updates, and the objective per place, nats, before each and after the last.

    `start` is T and where one starts; `prior` is κ. Raises BridgeError without evidence.
    """
    if not evidence.n_positions:
        raise BridgeError("no place of the text was read: give more text")
    width, n_rows = start.n_base, start.shape[0]
    stored = (start.rows * width + start.ids).numpy()
    keys = np.unique(np.concatenate([stored, *(batch.keys for batch in evidence.batches)]))
    rows = keys // width
    places = [np.searchsorted(keys, batch.keys) for batch in evidence.batches]
    T = np.zeros(len(keys))
    T[np.searchsorted(keys, stored)] = start.weights.double().numpy()
    seen = np.zeros(len(keys), dtype=bool)
    seen[np.concatenate(places)] = True
    even = seen / np.maximum(np.bincount(rows, weights=seen, minlength=n_rows), 1)[rows]
    M = _stochastic((1 - SPREAD) * T + SPREAD * even, rows, n_rows)
    history: list[float] = []
    for _ in range(iterations + 1):
        A, likelihood = np.zeros(len(keys)), 0.0
        for batch, place in zip(evidence.batches, places, strict=True):
            joint = batch.p * M[place]
            total = np.add.reduceat(joint, batch.start[:-1])
            likelihood += np.log(total).sum()
            np.add.at(A, place, joint / np.repeat(total, np.diff(batch.start)))
        if prior:
            likelihood += prior * float((T[T > 0] * np.log(M[T > 0])).sum())
        history.append(float(likelihood / evidence.n_positions))
        if len(history) > iterations or len(history) > 1 and history[-1] - history[-2] < ENOUGH:
            break
        M = _stochastic(A + prior * T, rows, n_rows, M)
    entries = torch.from_numpy(rows), torch.from_numpy(keys % width), torch.from_numpy(M).float()
    return BridgeTable.from_entries(*entries, (n_rows, width), n_expert=start.n_expert), history


def likeliest(
    bridge: Bridge,
    texts: Iterable[str],
    read: Callable[[Plan], Tensor],
    *,
    prior: float = PRIOR,
    window: int = 128,
    positions: int = POSITIONS,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Bridge:
    """`bridge`, a counted or canonical one, with its table raised to the likeliest for an expert and texts.

    `read(plan)` gives the expert's logits [n_nodes, V_E] at the nodes of plan.tree. `positions` of the text, in windows of
    `window` tokens, are read. Raises BridgeError without text, and for a bridge between a tokenizer and itself.
    """
    if bridge.identical:
        raise BridgeError("the two tokenizers are the same: there is nothing to estimate, q is the expert's own P")
    evidence = Evidence(Support(bridge.leaves, bridge.base), len(bridge.leaves))
    for part in (part for text in texts for part in text_windows(bridge, text, window)):
        plan = bridge.plan(part.text)
        evidence.add(States(plan, read(plan), bridge.under_way, bridge.padding), part.seen)
        progress("em", min(evidence.n_positions, positions), positions)
        if evidence.n_positions >= positions:
            break
    table, _ = maximise(evidence, bridge.table, prior=prior)
    return Bridge(bridge.expert, bridge.base, "em", table, bridge.leaves, bridge.unigram)


def _stochastic(weights: np.ndarray, rows: np.ndarray, n_rows: int, otherwise: np.ndarray | None = None) -> np.ndarray:
    """Rows scaled to sum 1; rows of sum 0 as in `otherwise`."""
    total = np.bincount(rows, weights=weights, minlength=n_rows)[rows]
    return np.where(total > 0, weights / np.where(total > 0, total, 1), 0.0 if otherwise is None else otherwise)
