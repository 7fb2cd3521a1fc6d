"""The merges of a BPE model as arrays, and whether BPE would join two tokens that stand side by side."""

from __future__ import annotations

import numpy as np

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
        keys = pairs[:, 0] * n_tokens + pairs[:, 1]
        self._keys, first = np.unique(keys, return_index=True)
        self._ranks = first.astype(np.int64)
        by_left = np.argsort(pairs[:, 0], kind="stable")
        self._partners = pairs[by_left, 1]
        self._partner_start = np.searchsorted(pairs[by_left, 0], np.arange(n_tokens + 1))
        self._begins_with = self._beginnings()

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

    def would_join(self, previous: int) -> np.ndarray:
        """[V] bool: tokens b for which BPE, given the pieces of `previous` and b in one word, does not end in the two."""
        candidates, piece = [], previous
        while piece >= 0:
            for partner in self._partners[self._partner_start[piece] : self._partner_start[piece + 1]].tolist():
                candidates.append(self._begins_with[1][self._begins_with[0][partner] : self._begins_with[0][partner + 1]])
            piece = self.right[piece]
        joins = np.zeros(self.n, dtype=bool)
        if candidates:
            tried = np.unique(np.concatenate(candidates))
            joins[tried] = self._joins(previous, tried)
        return joins

    def _joins(self, previous: int, tokens: np.ndarray) -> np.ndarray:
        x, y = np.full(len(tokens), previous, dtype=np.int64), tokens.copy()
        limit = np.full(len(tokens), NEVER)
        joins = np.zeros(len(tokens), dtype=bool)
        alive = np.arange(len(tokens))
        while len(alive):
            rank = self._rank_of(x[alive], y[alive])
            joins[alive] = rank < limit[alive]
            alive = alive[rank >= limit[alive]]
            later = self.rank[x[alive]] > self.rank[y[alive]]
            ended = np.maximum(self.rank[x[alive]], self.rank[y[alive]]) < 0
            # Of equal ranks the leftmost merge goes first: the pair that meets comes after one in x, before one in y.
            limit[alive] = np.where(later, self.rank[x[alive]], self.rank[y[alive]] + 1)
            x[alive], y[alive] = (
                np.where(later, self.right[x[alive]], x[alive]),
                np.where(later, y[alive], self.left[y[alive]]),
            )
            alive = alive[~ended]
        return joins

    def _rank_of(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if not len(self._keys):
            return np.full(len(x), NEVER)
        keys = x * self.n + y
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[place] == keys, self._ranks[place], NEVER)

    def _beginnings(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens by what they begin with: list p is tokens[start[p]:start[p + 1]]."""
        pieces, tokens = [], []
        piece, token = np.arange(self.n), np.arange(self.n)
        while len(piece):
            pieces.append(piece)
            tokens.append(token)
            piece = self.left[piece]
            token, piece = token[piece >= 0], piece[piece >= 0]
        pieces, tokens = np.concatenate(pieces), np.concatenate(tokens)
        order = np.argsort(pieces, kind="stable")
        return np.searchsorted(pieces[order], np.arange(self.n + 1)), tokens[order]
