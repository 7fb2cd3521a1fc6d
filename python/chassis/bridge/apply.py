"""From the expert's logits at the states of a plan to log q at every base position.

Before a position, either the text so far is encoded, in one of the states C, or a token t is under way that began in one of
the states S, after which the bytes u have come. With P(e) the probability of the tokens that lead to state e,

    q  ∝  Σ_{e ∈ C} P(e) P(· | e)ᵀ M   +   Σ_{(e, u) ∈ S} P(e) Σ_{t ⊐ u} P(t | e) M[t∖u]

All of it is known from the text before the position. Then what cannot follow the last base token is blocked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from chassis.bridge.plan import Plan, UnderWay
from chassis_kernels import BlockedTokens, BridgeTable, bridge_project
from chassis_kernels.bridge_project import Bridged

LISTED = 4_000_000  # entries of the padded lists of a chunk, at most


class Mixture(NamedTuple):
    """What may be at hand at a position; all shares and probabilities together sum to 1."""

    complete: np.ndarray  # [c] states in which the text is encoded
    shares: np.ndarray  # [c] their log shares
    logs: np.ndarray  # [m] log-probabilities of the tokens under way
    rows: np.ndarray  # [m] rows of their residuals


class States:
    """Logits [n_nodes, >= V_E] at the nodes of a plan's tree, with log P of the token that leads to each node."""

    def __init__(
        self, plan: Plan, logits: Tensor, under_way: UnderWay, padding: Tensor | None, temperature: float = 1.0
    ) -> None:
        self.plan, self.under_way, self.temperature = plan, under_way, temperature
        self.logits = logits[:, : under_way.leaves.n_expert]
        if padding is not None:
            self.logits = self.logits.masked_fill(padding.to(logits.device), -torch.inf)
        self.lse = torch.cat([(part.float() / temperature).logsumexp(1) for part in self.logits.split(256)])
        tree = plan.tree
        edge = self.log_p(torch.from_numpy(tree.parent[1:]), torch.from_numpy(tree.tokens[1:])).double().cpu().numpy()
        self.path = np.zeros(len(tree))  # log P of the tokens that lead to a node
        for node, log_p in enumerate(edge, 1):
            self.path[node] = self.path[tree.parent[node]] + log_p

    def log_p(self, nodes: Tensor | int, tokens: Tensor) -> Tensor:
        """log P(token | node), elementwise, float32."""
        tokens = tokens.to(self.logits.device)
        return self.logits[nodes, tokens].float() / self.temperature - self.lse[nodes]

    def mixture(self, position: int) -> Mixture:
        """The states and tokens that may be at hand at a position, with their shares."""
        complete = np.array(self.plan.complete[position], dtype=np.int64)
        shares, logs, rows = self.path[complete], [np.zeros(0)], [np.zeros(0, dtype=np.int64)]
        for node, begun in self.plan.under_way[position]:
            tokens, residuals = self.under_way.after(int(self.plan.tree.tokens[node]), begun)
            logs.append(self.log_p(node, torch.from_numpy(tokens)).double().cpu().numpy() + self.path[node])
            rows.append(residuals)
        logs, rows = np.concatenate(logs), np.concatenate(rows)
        total = np.logaddexp.reduce(np.concatenate([logs, shares, [-np.inf]]))
        total = 0.0 if total == -np.inf else total
        return Mixture(complete, shares - total, logs - total, rows)

    def rows(self, mixtures: list[Mixture]) -> tuple[Tensor, Tensor]:
        """Logits [n, V_E] of the complete states, several of a position mixed into one row, and their log shares [n]."""
        nodes = torch.tensor([m.complete[0] if len(m.complete) else 0 for m in mixtures], device=self.logits.device)
        logits = self.logits[nodes]
        share = [np.logaddexp.reduce(np.append(m.shares, -np.inf)) for m in mixtures]
        for row, m in enumerate(mixtures):
            if len(m.complete) > 1:
                states = torch.from_numpy(m.complete).to(logits.device)
                weights = torch.from_numpy(m.shares).float().to(logits.device)
                log_p = self.logits[states].float() / self.temperature - self.lse[states][:, None]
                logits[row] = ((log_p + weights[:, None]).logsumexp(0) * self.temperature).to(logits.dtype)
        return logits, torch.tensor(share, dtype=torch.float32, device=logits.device)


def project_positions(
    states: States,
    table: BridgeTable,
    positions: np.ndarray,
    blocked: tuple[BlockedTokens, Tensor] | None,
    normalize: bool,
) -> Iterator[tuple[np.ndarray, Bridged]]:
    """(positions, what `bridge_project` gives for them) in chunks of bounded size; each position once, in any order."""
    mixtures = {int(p): states.mixture(int(p)) for p in positions}
    ordered = sorted(mixtures, key=lambda p: len(mixtures[p].rows))
    begin = 0
    while begin < len(ordered):
        end = begin + 1
        while end < len(ordered) and (end - begin) * len(mixtures[ordered[end]].rows) <= LISTED and end - begin < 256:
            end += 1
        chunk = np.array(ordered[begin:end])
        yield chunk, _project(states, table, chunk, [mixtures[p] for p in chunk.tolist()], blocked, normalize)
        begin = end


def _project(states: States, table: BridgeTable, chunk, mixtures, blocked, normalize: bool) -> Bridged:
    """The one place where rows meet the kernel."""
    width = max(len(m.rows) for m in mixtures)
    log_probs = np.full((len(chunk), width), -np.inf, dtype=np.float32)
    ids = np.full((len(chunk), width), -1, dtype=np.int64)
    for row, m in enumerate(mixtures):
        log_probs[row, : len(m.logs)], ids[row, : len(m.rows)] = m.logs, m.rows
    logits, share = states.rows(mixtures)
    listed = torch.from_numpy(log_probs).to(logits.device), torch.from_numpy(ids).to(logits.device)
    options = {"log_probs": listed[0], "ids": listed[1], "log_weight": share}
    if blocked is not None:
        options |= {"blocked": blocked[0], "previous": blocked[1][torch.from_numpy(chunk)].to(logits.device)}
    return bridge_project(logits, table, temperature=states.temperature, normalize=normalize, **options)
