"""From the expert's logits at the states of a plan to log q at every base position.

Before a position, either the text so far is encoded, in one of the states C, or a token t is under way that began in one of
the states S, after which the bytes u have come. With P(e) the probability of the tokens that lead to state e,

    q  ∝  Σ_{e ∈ C} P(e) P(· | e)ᵀ M   +   Σ_{(e, u) ∈ S} P(e) Σ_{t ⊐ u} P(t | e) M[t∖u]

All of it is known from the text before the position. Then what cannot follow the last base token is blocked.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from chassis.bridge.plan import Plan
from chassis.bridge.stretches import log_totals, starts
from chassis.bridge.under_way import UnderWay
from chassis_kernels import BlockedTokens, BridgeTable, bridge_project
from chassis_kernels.bridge_project import Bridged

LISTED = 4_000_000  # entries of the padded lists of a chunk, at most
ROWS = 256  # of a chunk


class Mixture(NamedTuple):
    """What may be at hand at a position; all shares and probabilities together sum to 1."""

    complete: np.ndarray  # [c] states in which the text is encoded
    shares: np.ndarray  # [c] their log shares
    logs: np.ndarray  # [m] log-probabilities of the tokens under way
    rows: np.ndarray  # [m] rows of their residuals


class Mixtures(NamedTuple):
    """The mixtures of all positions [n] one after the other, and where those of each begin, [n + 1]."""

    everything: Mixture
    complete_start: np.ndarray
    start: np.ndarray


class States:
    """Logits [n_nodes, >= V_E] at the nodes of a plan's tree, with log P of the token that leads to each node. `log_sums`
    [n_nodes]: log Σ exp of all logits, of use where all of them are of tokens."""

    def __init__(
        self,
        plan: Plan,
        logits: Tensor,
        under_way: UnderWay,
        padding: Tensor | None,
        temperature: float = 1.0,
        log_sums: Tensor | None = None,
    ) -> None:
        self.plan, self.under_way, self.temperature = plan, under_way, temperature
        self.logits = logits[:, : under_way.leaves.n_expert]
        if padding is not None:
            self.logits = self.logits.masked_fill(padding.to(logits.device), -torch.inf)
        if log_sums is None or padding is not None or temperature != 1 or logits.shape[1] > self.logits.shape[1]:
            parts = (part.float() for part in self.logits.split(64))
            log_sums = torch.cat([(part if temperature == 1 else part / temperature).logsumexp(1) for part in parts])
        self.lse = log_sums
        tree = plan.tree
        edge = self.log_p(torch.from_numpy(tree.parent), torch.from_numpy(tree.tokens)).double().cpu().numpy()
        self.path = tree.path_sums(edge)  # log P of the tokens that lead to a node

    def log_p(self, nodes: Tensor | int, tokens: Tensor) -> Tensor:
        """log P(token | node), elementwise, float32."""
        tokens = tokens.to(self.logits.device)
        return self.logits[nodes, tokens].float() / self.temperature - self.lse[nodes]

    @cached_property
    def mixtures(self) -> Mixtures:
        """What may be at hand at every position."""
        plan = self.plan
        tokens, sizes = self.under_way.listed(plan)
        nodes, start = np.repeat(plan.begun, sizes), starts(sizes)[plan.begun_start]
        rows = self.under_way.leaves.row(tokens, np.repeat(plan.sizes, sizes))
        logs = self.log_p(torch.from_numpy(nodes), torch.from_numpy(tokens)).double().cpu().numpy() + self.path[nodes]
        shares, complete_start = self.path[plan.ended], plan.ended_start
        total = np.logaddexp(log_totals(logs, start), log_totals(shares, complete_start))
        total[total == -np.inf] = 0.0
        shares, logs = shares - np.repeat(total, np.diff(complete_start)), logs - np.repeat(total, np.diff(start))
        return Mixtures(Mixture(plan.ended, shares, logs, rows), complete_start, start)

    def mixture(self, position: int) -> Mixture:
        """The states and tokens that may be at hand at a position, with their shares."""
        everything, *starts = self.mixtures
        complete, listed = (slice(start[position], start[position + 1]) for start in starts)
        return Mixture(
            everything.complete[complete], everything.shares[complete], everything.logs[listed], everything.rows[listed]
        )

    @cached_property
    def n_complete(self) -> np.ndarray:
        """How many complete states each position has, [positions]."""
        return np.diff(self.mixtures.complete_start)

    def nodes(self, positions: np.ndarray) -> Tensor:
        """The first of the complete states [n] of positions; 0 where there is none."""
        everything, start, _ = self.mixtures
        nodes = np.where(self.n_complete[positions] > 0, np.append(everything.complete, 0)[start[positions]], 0)
        return torch.from_numpy(nodes).to(self.logits.device)

    @cached_property
    def shares(self) -> Tensor:
        """Log shares [positions] float32 of their complete states together."""
        everything, start, _ = self.mixtures
        return torch.from_numpy(log_totals(everything.shares, start)).float().to(self.logits.device)

    def rows(self, positions: np.ndarray) -> Tensor:
        """Logits [n, V_E] of the complete states, several of a position mixed into one row."""
        everything, start, _ = self.mixtures
        first, n = start[positions], self.n_complete[positions]
        logits = self.logits.index_select(0, self.nodes(positions))
        for several in np.unique(n[n > 1]).tolist():
            mixed = np.flatnonzero(n == several)
            place = first[mixed, None] + np.arange(several)
            states = torch.from_numpy(everything.complete[place]).to(logits.device)
            weights = torch.from_numpy(everything.shares[place]).float().to(logits.device) - self.lse[states]
            log_p = self.logits.index_select(0, states.flatten()).unflatten(0, states.shape).float() / self.temperature
            log_p += weights[:, :, None]
            mixed = torch.from_numpy(mixed).to(logits.device)
            logits[mixed] = (log_p.logsumexp(1) * self.temperature).to(logits.dtype)
        return logits


def project_positions(
    states: States,
    table: BridgeTable,
    positions: np.ndarray,
    blocked: tuple[BlockedTokens, Tensor] | None,
    normalize: bool,
    floor: Tensor | None,
) -> Iterator[tuple[np.ndarray, Bridged]]:
    """(positions, what `bridge_project` gives for them) in chunks of bounded size; each position once, in any order."""
    several = states.n_complete[positions] > 1
    for group in (positions[~several], positions[several]):
        width = np.diff(states.mixtures.start)[group]
        order = np.argsort(width, kind="stable")
        group, width = group[order], width[order]
        while len(group):
            fits = np.arange(min(len(group), ROWS)) * width[:ROWS] <= LISTED
            chunk, group, width = group[: fits.sum()], group[fits.sum() :], width[fits.sum() :]
            yield chunk, _project(states, table, chunk, blocked, normalize, floor)


def _project(states: States, table: BridgeTable, chunk: np.ndarray, blocked, normalize: bool, floor) -> Bridged:
    """The one place where rows meet the kernel."""
    everything, _, start = states.mixtures
    place = start[chunk, None] + np.arange(np.diff(start)[chunk].max())
    there = place < start[chunk + 1, None]
    log_probs, ids = np.full(place.shape, -np.inf, dtype=np.float32), np.full(place.shape, -1, dtype=np.int64)
    log_probs[there], ids[there] = everything.logs[place[there]], everything.rows[place[there]]
    several = states.n_complete[chunk].max() > 1
    logits, index = (states.rows(chunk), None) if several else (states.logits, states.nodes(chunk))
    listed = torch.from_numpy(log_probs).to(logits.device), torch.from_numpy(ids).to(logits.device)
    options = {"log_probs": listed[0], "ids": listed[1], "log_weight": states.shares[chunk], "index": index, "floor": floor}
    if blocked is not None:
        options |= {"blocked": blocked[0], "previous": blocked[1][torch.from_numpy(chunk)].to(logits.device)}
    return bridge_project(logits, table, temperature=states.temperature, normalize=normalize, **options)
