"""Jeffrey's rule: the expert says which of its tokens comes, the base which of its own that token then means.

    q(b) = Σ_t P(t) · p_B(b) W[t, b] / Σ_b' p_B(b') W[t, b']

p_B are the base's own probabilities at the place, t an expert token or a residual of one. W is sparse; only ratios within a
row count, so each row is kept scaled to sum 1, as a `BridgeTable`:

* jeffrey: W[t, b] is 1 where b begins with the bytes of t or is the first token of the base's encoding of t, else 0;
* jeffrey_counted: W = M / unigram, how much more often b is where t begins, on the text that was counted, than elsewhere.

Source: probability kinematics (Jeffrey, The Logic of Decision, 1965).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from chassis.bridge.leaves import Leaves, prefix_range
from chassis.bridge.rules import string_table
from chassis.text.token_bytes import TokenBytes
from chassis_kernels import BlockedTokens, BridgeTable
from chassis_kernels.bridge_project import Bridged
from chassis_kernels.reference.bridge_project import blocked_places

METHODS = ("jeffrey", "jeffrey_counted")


def string_ratios(expert: TokenBytes, base: TokenBytes, leaves: Leaves) -> BridgeTable:
    """W of "jeffrey", from the bytes alone."""
    first = string_table("canonical", expert, base, leaves.strings)
    texts = sorted(base.ids_by_bytes)
    ids = np.array([base.ids_by_bytes[text][0] for text in texts], dtype=np.int64)
    spans = np.array([prefix_range(texts, data) if data else (0, 0) for data in leaves.strings], dtype=np.int64)
    counts = spans[:, 1] - spans[:, 0]
    rows = np.repeat(np.arange(len(spans)), counts)
    longer = ids[np.arange(len(rows)) + np.repeat(spans[:, 0] - (counts.cumsum() - counts), counts)]
    keys = np.unique(np.concatenate([rows * base.width + longer, (first.rows * base.width + first.ids).numpy()]))
    return _scaled(torch.from_numpy(keys // base.width), torch.from_numpy(keys % base.width), torch.ones(len(keys)), first)


def counted_ratios(table: BridgeTable, unigram: Tensor) -> BridgeTable:
    """W of "jeffrey_counted", from a counted table."""
    return _scaled(table.rows, table.ids.long(), table.weights.double() / unigram[table.ids.long()], table)


def weigh(
    P: Tensor,  # [n, rows]
    table: BridgeTable,
    base_log_probs: Tensor,  # [n, V_B]
    blocked: tuple[BlockedTokens, Tensor] | None = None,
    *,
    normalize: bool,
) -> Bridged:
    """log q, mass and uncertainty as `bridge_project` gives them; `blocked`: lists, and which of them each row has.

    What is blocked is left out of q, not of p_B: an expert token tells as much about the base's where some cannot follow.
    """
    P, ids, tiny = P.double(), table.ids.long(), torch.finfo(torch.float64).tiny
    weights = base_log_probs.double().exp()[:, ids] * table.weights.double()
    total = torch.zeros_like(P).index_add_(1, table.rows, weights)
    shares = weights / total.clamp_min(tiny)[:, table.rows]
    best = torch.zeros_like(P).scatter_reduce_(1, table.rows.expand_as(shares), shares, "amax")
    q = torch.zeros_like(base_log_probs, dtype=torch.float64).index_add_(1, ids, P[:, table.rows] * shares)
    mass = q.sum(1)
    if blocked is not None:
        lists, places = blocked
        q[blocked_places(lists.start, lists.tokens, places)] = 0
    rest = q.sum(1)
    mass = torch.where(rest > 0, mass, 0.0)
    q = q * ((1 if normalize else mass) / rest.clamp_min(tiny))[:, None]
    return Bridged(q.log().float(), mass.float(), (1 - (P * best).sum(1)).float())


def _scaled(rows: Tensor, ids: Tensor, weights: Tensor, like: BridgeTable) -> BridgeTable:
    total = torch.zeros(like.shape[0], dtype=torch.float64).index_add(0, rows, weights.double())
    return BridgeTable.from_entries(rows, ids, (weights / total[rows]).float(), like.shape, n_expert=like.n_expert)
