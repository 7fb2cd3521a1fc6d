"""The merges of a BPE model as arrays, and whether BPE would join two tokens that stand side by side.

Token b is taken apart from its left end, `previous` from its right end, the merge of highest rank first: x are the right
ends of `previous`, outermost first, y the left ends of b. Ranks fall along both, so that x_i and y_j face each other iff
x_{i-1} is taken apart before y_j and y_{j-1} before x_i, and BPE joins them iff their merge comes before that of the piece
taken apart last. All of this is known from x_i, y_j and y_{j-1}: one look at each merge of an x_i tells all tokens b.
"""

from __future__ import annotations

import numpy as np

from chassis.bridge.stretches import ranges
from chassis.text.token_bytes import TokenBytes

NEVER = np.iinfo(np.int64).max


class Merges:
    """`left`, `right` [V]: what a token was made from, -1 for single pieces; `rank` [V] of that merge, -1."""

    def __init__(self, n_tokens: int, pairs: np.ndarray, made: np.ndarray) -> None:
        self.n = n_tokens
        self.rank = np.full(n_tokens, -1, dtype=np.int64)
        self.left, self.right = np.full(n_tokens, -1, dtype=np.int64), np.full(n_tokens, -1, dtype=np.int64)
        order = np.arange(len(pairs))[::-1]  # of several merges that make a token the first one counts
        self.rank[made[order]], self.left[made[order]], self.right[made[order]] = order, pairs[order, 0], pairs[order, 1]
        keys, first = np.unique(pairs[:, 0] * n_tokens + pairs[:, 1], return_index=True)
        self._partner, self._pair_rank = keys % n_tokens, first  # the merges in order of their left pieces
        self._partners = np.searchsorted(keys, np.arange(n_tokens + 1) * n_tokens)
        self._child = np.argsort(self.left, kind="stable")  # tokens in order of their left pieces
        self._children = np.searchsorted(self.left[self._child], np.arange(n_tokens + 1))
        self._levels = []  # tokens that begin with those of the level before
        level = np.flatnonzero(self.left < 0)
        while len(level):
            level = self._child[ranges(self._children, level)[0]]
            self._levels.append((level, self.left[level]))

    @classmethod
    def read(cls, tokens: TokenBytes) -> Merges | None:
        """From a tokenizer; None if its model is not BPE, or makes a token from one that a later merge makes."""
        model = tokens.model
        if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            return None
        if model.get("dropout"):
            return None
        vocab = model["vocab"]
        pairs, made = [], []
        for merge in model["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            pairs.append((vocab[left], vocab[right]))
            made.append(vocab[left + right])
        merges = cls(tokens.width, np.array(pairs, dtype=np.int64).reshape(-1, 2), np.array(made, dtype=np.int64))
        compound = merges.left >= 0
        ranks = merges.rank[compound]
        ordered = (merges.rank[merges.left[compound]] < ranks) & (merges.rank[merges.right[compound]] < ranks)
        return merges if ordered.all() else None

    def would_join(self, previous: np.ndarray) -> np.ndarray:
        """Tokens b [n, V] for which BPE, given the pieces of `previous` [n] and b in one word, does not end in the two."""
        direct, through = np.zeros((2, self.n, len(previous)), dtype=bool)
        x, which, before = previous, np.arange(len(previous)), np.full(len(previous), NEVER)  # the rank of x_{i-1}
        while len(x):
            merges, of = ranges(self._partners, x)
            y, rank = self._partner[merges], self._pair_rank[merges]
            meet = (rank < before[of]) & (self.rank[y] < before[of])
            y, rank, of = y[meet], rank[meet], of[meet]
            direct[y, which[of]] = True
            places, at = ranges(self._children, y)
            above = self._child[places]
            later = self.rank[above] >= np.maximum(rank, self.rank[x][of])[at]
            through[above[later], which[of[at[later]]]] = True
            x, before = self.right[x], self.rank[x]
            x, which, before = x[x >= 0], which[x >= 0], before[x >= 0]
        for tokens, left in self._levels:
            through[tokens] |= through[left]
        return (direct | through).T
