"""Held-out numbers: KL, no-op KL, share removed, top-1 agreement and bits per byte, in one pass for every candidate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from chassis.adapter import Adapter
from chassis.errors import ChassisError
from chassis.experts import Readout
from chassis.lens import Lens
from chassis.probes import Probe, Rows, Window
from chassis.refine import delta_of, kl_rows
from chassis_kernels import Delta


@dataclass
class Score:
    """Sums over rows for one candidate; KL in nats per row, NLL in nats per predicted token."""

    rows: int = 0
    agree: int = 0
    nll: float = 0.0
    n_bytes: int = 0
    _kl: list[tuple[float, int]] = field(default_factory=list)  # per window: sum and number of rows

    def add(self, kl: torch.Tensor, agree: torch.Tensor, nll: torch.Tensor, rows: Rows) -> None:
        """Add one batch of per-row values [n]; `nll` is over the rows that have a next token."""
        self.rows += len(kl)
        self.agree += int(agree.sum())
        self.nll += nll.double().sum().item()
        self.n_bytes += rows.n_bytes
        n_windows = int(rows.window[-1]) + 1
        sums = torch.zeros(n_windows, dtype=torch.float64, device=kl.device).index_add_(0, rows.window, kl.double())
        counts = torch.bincount(rows.window, minlength=n_windows)
        self._kl += zip(sums.tolist(), counts.tolist(), strict=True)

    @property
    def kl(self) -> float:
        return sum(total for total, _ in self._kl) / self.rows

    @property
    def stderr(self) -> float:
        """Standard error of `kl`, windows being the independent units."""
        mean = self.kl
        return math.sqrt(sum((total - mean * count) ** 2 for total, count in self._kl)) / self.rows

    @property
    def top1(self) -> float:
        return self.agree / self.rows

    @property
    def bits_per_byte(self) -> float:
        return self.nll / math.log(2) / self.n_bytes if self.n_bytes else float("nan")


@dataclass
class Scores:
    """What `evaluate` measured: the base alone, the expert, each adapter by name, each layer of the lens."""

    no_op: Score
    expert: Score
    adapters: dict[str, Score]
    layers: dict[int | str, Score]

    def share_removed(self, score: Score) -> float:
        """Part of the no-op KL that is gone: 1 is the expert itself, 0 the base, below 0 worse than doing nothing."""
        return 1 - score.kl / self.no_op.kl if self.no_op.kl > 0 else 0.0

    def gap_closed(self, score: Score) -> float:
        """Part of the base-expert gap in bits per byte that is closed; NaN where the expert is no better than the base."""
        gap = self.no_op.bits_per_byte - self.expert.bits_per_byte
        return (self.no_op.bits_per_byte - score.bits_per_byte) / gap if gap > 0 else float("nan")


@torch.no_grad()
def evaluate(
    probe: Probe,
    windows: Sequence[Window],
    base: Readout,
    *,
    adapters: dict[str, Adapter] | None = None,
    lens: Lens | None = None,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Score adapters and lenses against the expert over `windows`, none of which may have been fitted on.

    `progress` is called with the number of windows done. Raises ChassisError without windows.
    """
    if not windows:
        raise ChassisError("nothing to evaluate on: give test documents")
    expert = probe.expert.readout
    layers = lens.layers if lens else []
    scores = Scores(Score(), Score(), {name: Score() for name in adapters or {}}, {layer: Score() for layer in layers})
    done = 0
    for rows in probe.batches(windows):
        following = rows.next_ids >= 0
        expert_nll = _score(scores.no_op, rows, rows.final, base, expert, None, following)
        scores.expert.add(torch.zeros_like(following, dtype=torch.float64), torch.ones_like(following), expert_nll, rows)
        for name, adapter in (adapters or {}).items():
            _score(scores.adapters[name], rows, rows.final, base, expert, delta_of(adapter, rows.final), following)
        for layer, score in scores.layers.items():
            states = rows.final if layer == "final" else rows.layers[layer]
            readout = base if expert.weight is None else expert
            _score(score, rows, lens.hidden(layer, states), readout, expert, None, following)
        done += int(rows.window[-1]) + 1
        if progress:
            progress(done)
    return scores


def _score(score, rows: Rows, states, readout: Readout, expert: Readout, delta, following) -> torch.Tensor:
    """Add one candidate's batch to `score`; returns the expert's NLL of the next tokens."""
    kl, stats = kl_rows(states, readout, rows.expert, expert, delta, stats=True)
    labels = rows.next_ids[following]
    chosen = None if delta is None else Delta(delta.u[following], delta.v, delta.c)
    nll = stats.lse_a[following] - logit_at(states[following], readout, labels, chosen)
    score.add(kl, stats.argmax_a == stats.argmax_b, nll, rows)
    return stats.lse_b[following] - logit_at(rows.expert[following], expert, labels)


def logit_at(states: torch.Tensor, readout: Readout, ids: torch.Tensor, delta: Delta | None = None) -> torch.Tensor:
    """The logit of one token per row [n] fp32, without the other V - 1."""
    if readout.weight is None:
        return states.gather(1, ids[:, None])[:, 0].float()
    logit = (states.float() * readout.weight[ids].float()).sum(1)
    if readout.bias is not None:
        logit = logit + readout.bias[ids].float()
    if delta is not None:
        logit = logit + (delta.u * delta.v[:, ids].T).sum(1)
        logit = logit if delta.c is None else logit + delta.c[ids]
    logit = logit * readout.scale
    return logit if readout.softcap is None else readout.softcap * torch.tanh(logit / readout.softcap)


def passage(probe: Probe, window: Window, base: Readout, adapter: Adapter, tokenizer) -> dict:
    """One window token by token: {document, tokens: [{text, no_op_kl, kl}]}, nats for the prediction after each token."""
    rows = next(iter(probe.batches([window])))
    no_op = kl_rows(rows.final, base, rows.expert, probe.expert.readout)
    kl = kl_rows(rows.final, base, rows.expert, probe.expert.readout, delta_of(adapter, rows.final))
    texts = token_texts(tokenizer, window.ids.tolist())
    silent = [None] * (len(texts) - len(kl))  # an expert may have nothing to say of the end
    values = zip(texts, no_op.tolist() + silent, kl.tolist() + silent, strict=True)
    return {"document": window.document, "tokens": [{"text": t, "no_op_kl": a, "kl": b} for t, a, b in values]}


def token_texts(tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds to the decoded text, in context, so that spaces stay where they belong."""
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        texts.append(text[len(before) :] if text.startswith(before) else text[-1:])
        before = text
    return texts
