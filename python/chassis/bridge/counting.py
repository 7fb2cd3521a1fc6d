"""Counts of which base token follows at each place an expert token, or a residual of one, begins.

    N[row, b] = number of base tokens b in the text that begin where `row` begins
    M = (N + prior) / row sum

One pass over any text with both tokenizers. `row` is the expert token that holds the first byte of the base token, or, when
the base token begins inside it, its residual. The prior is one count: for a token, of the first token of the base's encoding
of its bytes; for a residual, the distribution of the expert token with the same bytes, if there is one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from chassis.bridge.leaves import Leaves
from chassis.errors import BridgeError
from chassis.text.token_bytes import Encoded, TokenBytes
from chassis_kernels import BridgeTable

MIN_BYTES = 10_000
BATCH = 64  # texts encoded, and counted, at once
MERGE_AT = 4_000_000  # places waiting to be counted


class Counts:
    """Counted places as sorted keys row * V_B + b with their numbers; `n_bytes` of text were read."""

    def __init__(self, leaves: Leaves, n_base: int) -> None:
        self.leaves, self.n_base, self.n_bytes = leaves, n_base, 0
        self.keys, self.numbers = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        self._waiting: list[np.ndarray] = []
        self._n_waiting = 0

    def add(self, expert: Encoded, base: Encoded, is_text: np.ndarray) -> None:
        """Count a text in both tokenizations; `is_text` [V_E] are the expert tokens whose bytes are known."""
        begins = np.concatenate([[0], base.ends[:-1]])
        holder = np.searchsorted(expert.ends, begins, side="right")
        tokens = expert.ids[holder]
        cut = begins - np.concatenate([[0], expert.ends[:-1]])[holder]
        known = is_text[tokens]
        rows = self.leaves.row(tokens[known], cut[known])
        self._waiting.append(rows * self.n_base + base.ids[known])
        self._n_waiting += len(rows)
        self.n_bytes += len(base.data)
        if self._n_waiting >= MERGE_AT:
            self.merge()

    def merge(self) -> None:
        """Sort what is waiting into the counts."""
        keys, numbers = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *self._waiting]), return_counts=True)
        keys, numbers = np.concatenate([self.keys, keys]), np.concatenate([self.numbers, numbers])
        self.keys, place = np.unique(keys, return_inverse=True)
        self.numbers = np.bincount(place, weights=numbers, minlength=len(self.keys)).astype(np.int64)
        self._waiting, self._n_waiting = [], 0

    def table(self, prior: BridgeTable) -> BridgeTable:
        """M with one count of `prior` added to every row."""
        self.merge()
        rows = torch.cat([torch.from_numpy(self.keys // self.n_base), prior.rows])
        ids = torch.cat([torch.from_numpy(self.keys % self.n_base), prior.ids.long()])
        weights = torch.cat([torch.from_numpy(self.numbers).double(), prior.weights])
        total = torch.zeros(len(self.leaves), dtype=torch.float64).index_add(0, rows, weights.double())
        return BridgeTable.from_entries(
            rows, ids, (weights / total[rows]).float(), (len(self.leaves), self.n_base), n_expert=prior.n_expert
        )

    def unigram(self) -> torch.Tensor:
        """How often each base token occurs [V_B] float64, one added."""
        self.merge()
        numbers = np.bincount(self.keys % self.n_base, weights=self.numbers, minlength=self.n_base)
        return torch.from_numpy((numbers + 1) / (numbers.sum() + self.n_base))


def count(expert: TokenBytes, base: TokenBytes, leaves: Leaves, texts: Iterable[str]) -> Counts:
    """Count over `texts`; raises BridgeError for less than MIN_BYTES of text."""
    counts = Counts(leaves, base.width)
    for one, other in encode_both(expert, base, texts):
        if len(other):
            counts.add(one, other, expert.is_text)
    counts.merge()
    if counts.n_bytes < MIN_BYTES:
        raise BridgeError(
            f"{counts.n_bytes} bytes of text are too few to count from: give {MIN_BYTES} or more, or build 'canonical'"
        )
    return counts


def encode_both(expert: TokenBytes, base: TokenBytes, texts: Iterable[str]) -> Iterator[tuple[Encoded, Encoded]]:
    """The texts in both tokenizations, over one and the same bytes; BATCH of them at a time, one after the other."""
    texts = iter(texts)
    while batch := list(itertools.islice(texts, BATCH)):
        batch = [joint_text(expert, base, text) for text in batch]
        yield _joined(expert.encode_batch(batch)), _joined(base.encode_batch(batch))


def _joined(parts: list[Encoded]) -> Encoded:
    data = b"".join(part.data for part in parts)
    begin = np.cumsum([0, *(len(part.data) for part in parts[:-1])])
    ends = np.concatenate([part.ends for part in parts]) + np.repeat(begin, [len(part) for part in parts])
    return Encoded(np.concatenate([part.ids for part in parts]), ends, data)


def joint_text(expert: TokenBytes, base: TokenBytes, text: str) -> str:
    """The text as both tokenizers read it; raises BridgeError if each changes what the other leaves."""
    for _ in range(4):
        once = base.normalize(expert.normalize(text))
        if once == text and expert.normalize(once) == once:
            return once
        text = once
    raise BridgeError(f"the tokenizers' normalizers do not agree on {text[:40]!r}: no bridge can compare their bytes")
