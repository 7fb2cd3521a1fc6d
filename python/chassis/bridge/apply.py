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
from chassis_kernels import BlockedTokens, BridgeTable, bridge_project, log_sums
from chassis_kernels.bridge_project import Bridged

CELLS = 16_000_000  # of a tile of log q


class Mixture(NamedTuple):
    """What may be at hand at a position; all shares and probabilities together sum to 1."""

    complete: np.ndarray  # [c] states in which the text is encoded
    shares: np.ndarray  # [c] their log shares
    logs: np.ndarray  # [m] log-probabilities of the tokens under way
    rows: np.ndarray  # [m] rows of their residuals


class Tile(NamedTuple):
    """The mixtures of positions [n] as tensors."""

    nodes: Tensor  # [c] complete states
    shares: Tensor  # [c] float32, their log shares
    nodes_start: Tensor  # [n + 1] where those of each position begin
    logs: Tensor  # [m] float32, log-probabilities of the tokens under way
    rows: Tensor  # [m] rows of their residuals
    listed_start: Tensor  # [n + 1]


class Mixtures(NamedTuple):
    """The mixtures of all positions [n] one after the other, and where those of each begin, [n + 1]."""

    everything: Mixture
    complete_start: np.ndarray
    start: np.ndarray


class States:
    """Logits [n_nodes, >= V_E] at the nodes of a plan's tree, with log P of the token that leads to each node. `known_sums`
    [n_nodes]: log Σ exp of all logits, of use where all of them are of tokens."""

    def __init__(
        self,
        plan: Plan,
        logits: Tensor,
        under_way: UnderWay,
        padding: Tensor | None,
        temperature: float = 1.0,
        known_sums: Tensor | None = None,
    ) -> None:
        self.plan, self.under_way, self.temperature = plan, under_way, temperature
        self.logits = logits[:, : under_way.leaves.n_expert]
        if padding is not None:
            self.logits = self.logits.masked_fill(padding.to(logits.device), -torch.inf)
        of_tokens = padding is None and temperature == 1 and logits.shape == self.logits.shape
        self.lse = known_sums if of_tokens and known_sums is not None else log_sums(self.logits, temperature)
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

    def tile(self, of: slice) -> Tile:
        """The mixtures of the positions `of`."""
        everything, *starts = self.mixtures
        nodes_start, listed_start = (start[of.start : of.stop + 1] for start in starts)
        complete, listed = (slice(start[0], start[-1]) for start in (nodes_start, listed_start))
        tile = Tile(
            nodes=everything.complete[complete],
            shares=everything.shares[complete].astype(np.float32),
            nodes_start=nodes_start - complete.start,
            logs=everything.logs[listed].astype(np.float32),
            rows=everything.rows[listed],
            listed_start=listed_start - listed.start,
        )
        return Tile(*(torch.from_numpy(part).to(self.logits.device) for part in tile))


def project(
    states: States, table: BridgeTable, blocked: tuple[BlockedTokens, Tensor] | None, normalize: bool, floor: Tensor | None
) -> Iterator[tuple[slice, Bridged]]:
    """(positions, what `bridge_project` gives for them) in tiles of bounded size, in order."""
    step = max(1, CELLS // table.n_base)
    for begin in range(0, len(states.plan), step):
        of = slice(begin, min(begin + step, len(states.plan)))
        tile, masked = states.tile(of), {}
        if blocked is not None:
            masked = {"blocked": blocked[0], "previous": blocked[1][of].to(states.logits.device)}
        found = bridge_project(
            states.logits,
            table,
            index=tile.nodes,
            index_start=tile.nodes_start,
            log_weight=tile.shares,
            log_probs=tile.logs,
            ids=tile.rows,
            listed_start=tile.listed_start,
            floor=floor,
            temperature=states.temperature,
            normalize=normalize,
            **masked,
        )
        yield of, found
