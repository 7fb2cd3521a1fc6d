"""Bridges without a table: a head over the base's tokens for the expert's final states, in closed form.

    q = softmax of head(h),    h the expert's final state where the text so far is encoded

Anchors are tokens of equal bytes, e their rows in the expert's unembedding and w in the base's, centred. Every head but the
last has rows of the expert's width; an anchor keeps the expert's own row, other tokens get

* ridge: w A, with A the ridge regression of e on w over the anchors;
* procrustes: the same with s A, A of orthonormal rows or columns;
* pursuit: Σ c_i e_i, where w ≈ Σ c_i w_i over at most 64 anchors (orthogonal matching pursuit).

* pseudo_inverse: w A for the anchors too, which is W_B h' for the h' = A h that gives the anchors' logits best;
* hidden_ridge: the base's own unembedding of a ridge regression of the base's final state on the expert's, over places where
  tokens of both end (moments of one pass over text).

A head alone knows no table. `OnOpenMass` lets one settle what a counted table leaves open.

Source: ridge and Procrustes (Schönemann 1966) between embeddings as for words (Artetxe, Labaka & Agirre 2018).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from chassis.bridge.bridge import Bridge
from chassis.bridge.matching_pursuit import matching_pursuit
from chassis.bridge.reading import Reading
from chassis.bridge.rules import special_pairs
from chassis.errors import BridgeError
from chassis.experts import Readout
from chassis_kernels import Moments, fit_ridge, procrustes
from chassis_kernels.bridge_project import Bridged
from chassis_kernels.reference.bridge_project import blocked_places
from chassis_kernels.ridge import solve

MODES = ("ridge", "procrustes", "pursuit", "pseudo_inverse", "hidden_ridge")
ALPHA = 1e-3  # ridge, relative to the mean eigenvalue
ATOMS = 64


@dataclass(frozen=True)
class SemanticHead:
    """`readout` over the base's tokens of h, or of h @ change[0] + change[1]; `known` [V_B] bool: tokens it can say."""

    mode: str
    readout: Readout
    known: Tensor
    change: tuple[Tensor, Tensor] | None = None

    def log_q(self, hidden: Tensor) -> Tensor:
        """log q [n, V_B] for final states [n, D_E] of the expert."""
        hidden = hidden.float() if self.change is None else hidden.float() @ self.change[0] + self.change[1]
        logits = hidden @ self.readout.weight.float().T
        logits = (logits if self.readout.bias is None else logits + self.readout.bias.float()) * self.readout.scale
        cap = self.readout.softcap
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return logits.masked_fill(~self.known, -torch.inf).log_softmax(1)

    def apply(self, bridge: Bridge, reading: Reading, *, masked: bool = True) -> Bridged:
        """As `Bridge.apply` at the base positions of a window; the base's unigram distribution where no state is encoded.

        Nothing is unmapped, and no table says how uncertain it is: uncertainty is NaN.
        """
        node = reading.ended(bridge)
        log_q = self.log_q(reading.hidden[torch.from_numpy(node.clip(0))])
        log_q[torch.from_numpy(node < 0)] = bridge.unigram.log().to(log_q)
        if masked:
            lists, places = bridge.mask.lists([-1, *reading.plan.base_ids[:-1].tolist()])
            log_q[blocked_places(lists.start, lists.tokens, places)] = -torch.inf
            log_q = log_q.log_softmax(1)
        return Bridged(log_q, torch.ones_like(log_q[:, 0]), torch.full_like(log_q[:, 0], torch.nan))


@dataclass(frozen=True)
class OnOpenMass:
    """A counted bridge that asks a head, not the base, which of its tokens an open expert token means.

    Jeffrey's rule with `ratios`, the bridge's own asking the base, and p_B half the head's q, half the unigram distribution.
    The unigram distribution alone would give the counted bridge back.
    """

    head: SemanticHead
    ratios: Bridge

    def apply(self, bridge: Bridge, reading: Reading, *, masked: bool = True) -> Bridged:
        """As `Bridge.apply` at the base positions of a window."""
        log_q = self.head.apply(bridge, reading, masked=False).log_q
        says = torch.logaddexp(log_q, bridge.unigram.log().to(log_q)) - math.log(2)
        return self.ratios.apply(reading.plan, reading.logits, base_log_probs=says, masked=masked)


def head_by_rows(mode: str, bridge: Bridge, base: Readout, expert: Readout) -> SemanticHead:
    """The head of one of MODES but "hidden_ridge". Raises BridgeError for other modes and for fewer than 2 D_B anchors."""
    tokens = sorted(ids[0] for ids in bridge.base.ids_by_bytes.values())
    theirs = bridge.expert.ids_by_bytes
    pairs = [(b, theirs[bridge.base.bytes[b]][0]) for b in tokens if bridge.base.bytes[b] in theirs]
    if len(pairs) < 2 * base.weight.shape[1]:
        raise BridgeError(
            f"{len(pairs)} tokens of equal bytes to fit a map of width {base.weight.shape[1]}: expected twice as many"
        )
    ours, others = torch.tensor(pairs).T
    W, E = base.weight.float(), expert.weight.float()
    E = E if expert.bias is None else torch.cat([E, expert.bias.float()[:, None]], 1)
    mean_w, mean_e = W[ours].mean(0), E[others].mean(0)
    w, e, rows = W[ours] - mean_w, E[others] - mean_e, W - mean_w
    if mode in ("ridge", "pseudo_inverse"):
        made = rows @ fit_ridge(w, e, ALPHA, alpha_scale="trace")[0]
    elif mode == "procrustes":
        made = rows @ procrustes(w, e).W.float()
    elif mode == "pursuit":
        made = torch.zeros(len(W), E.shape[1])
        free = torch.tensor(sorted(set(tokens) - set(ours.tolist())), dtype=torch.long)
        made[free] = matching_pursuit(w, rows[free], ATOMS) @ e
    else:
        raise BridgeError(f"mode {mode!r}: expected one of {', '.join(MODES[:-1])}")
    made = made + mean_e
    if mode != "pseudo_inverse":
        made[ours] = E[others]
    known = torch.zeros(bridge.base.width, dtype=torch.bool)
    known[tokens] = True
    for one, other in special_pairs(bridge.expert, bridge.base).items():
        made[other], known[other] = E[one], True
    weight, bias = (made, None) if expert.bias is None else (made[:, :-1], made[:, -1])
    return SemanticHead(mode, Readout(weight[: len(known)], bias, expert.softcap, expert.scale), known)


def head_by_states(bridge: Bridge, base: Readout, readings: Iterable[Reading]) -> SemanticHead:
    """The head "hidden_ridge", fitted on windows that both models read. Raises BridgeError without any."""
    moments = None
    for reading in readings:
        node = reading.ended(bridge)
        kept = reading.scored.numpy() & (node >= 0) & reading.base_hidden.isfinite().all(1).cpu().numpy()
        x, y = reading.hidden[torch.from_numpy(node[kept])], reading.base_hidden[torch.from_numpy(kept)]
        moments = moments or Moments(x.shape[1], y.shape[1])
        moments.update(x.float(), y.float())
    if moments is None or not moments.rows:
        raise BridgeError("no place where tokens of both end: give more text to fit the map between hidden states on")
    solution = solve(moments, ALPHA)
    known = torch.tensor([role not in ("padding", "unk") for role in bridge.base.role_of])
    return SemanticHead("hidden_ridge", base, known, (solution.W.float(), solution.b.float()))
