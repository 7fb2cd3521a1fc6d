"""Trees of expert states: trunks, each the encoding of a text, and what branches off them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from chassis.bridge.stretches import starts

Tokens = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Tree:
    """Nodes are states after a token; node 0 is the state before any. Nodes 0..n_trunk encode the whole text, in order."""

    tokens: np.ndarray  # [n_nodes] int64, the token that leads to a node; -1 for node 0
    parent: np.ndarray  # [n_nodes] int64, always a smaller number; -1 for node 0
    depth: np.ndarray  # [n_nodes] int64
    n_trunk: int

    def __len__(self) -> int:
        return len(self.tokens)

    def path(self, node: int) -> list[int]:
        """Tokens from the beginning to `node`."""
        path = []
        while node > 0:
            path.append(int(self.tokens[node]))
            node = int(self.parent[node])
        return path[::-1]

    def path_sums(self, values: np.ndarray) -> np.ndarray:
        """Sums [n_nodes] of `values` [n_nodes] float along the path to each node; 0 at nodes without a parent."""
        n = len(self)
        above = np.append(np.where(self.parent < 0, n, self.parent), n)
        sums = np.append(np.where(self.parent < 0, 0.0, values), 0.0)
        while (above < n).any():  # the paths summed up double in length
            sums += sums[above]
            above = above[above]
        return sums[:n]


class Trees:
    """The trees of several texts while branches are added, their nodes under one numbering: first the trunks, one after the
    other. These are given by the tokens of their `pieces`, each of the text numbered `text` [pieces]; `roots` [pieces] are
    the states where the pieces begin."""

    def __init__(self, pieces: Sequence[Tokens], text: np.ndarray) -> None:
        tokens, self._first = _flat(pieces)
        self._piece = np.repeat(np.arange(len(pieces)), np.diff(self._first))
        self.roots = self._first[:-1] + text
        self.n_trunk = np.bincount(text, np.diff(self._first)).astype(np.int64)
        begins = starts(self.n_trunk + 1)[:-1]
        self._nodes = np.arange(len(tokens)) + 1 + text[self._piece]
        self.text = np.repeat(np.arange(len(begins)), self.n_trunk + 1)
        self.tokens = np.full(len(self.text), -1)
        self.tokens[self._nodes] = tokens
        self.parent = np.arange(-1, len(self.text) - 1)
        self.parent[begins] = -1
        self.depth = np.arange(len(self.text)) - begins[self.text]

    def trunk_ends(self, lengths: np.ndarray, pieces: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The trunks' states after a token, and where it ends, both in order; `lengths` [V] of the tokens, `pieces` and
        their `ends`. Not of pieces to which the lengths of their tokens do not add up."""
        total = np.append(0, lengths[self.tokens[self._nodes]].cumsum())
        begin = total[self._first]
        sure = (np.diff(begin) == ends - pieces)[self._piece]
        return self._nodes[sure], ((pieces - begin[:-1])[self._piece] + total[1:])[sure]

    def grow(self, roots: np.ndarray, paths: Sequence[Tokens], which: np.ndarray) -> np.ndarray:
        """The nodes [m] at the end of those of `paths` numbered `which` [m], each from one of the trunks' nodes `roots` [m];
        made where they are missing. To be called once, since it looks for what is there among the trunks alone."""
        tokens, first = _flat(paths)
        at, left, end = roots.copy(), first[which], first[which + 1]
        going = np.flatnonzero(left < end)
        while len(going):  # as far as a path is the trunk
            child = np.minimum(at[going] + 1, len(self.tokens) - 1)
            goes = (self.parent[child] == at[going]) & (self.tokens[child] == tokens[left[going]])
            going = going[goes]
            at[going] += 1
            left[going] += 1
            going = going[left[going] < end[going]]
        width = tokens.max(initial=0) + 1
        going = np.flatnonzero(left < end)
        while len(going):  # what is left of all paths, a token at a time
            new, place = np.unique(at[going] * width + tokens[left[going]], return_inverse=True)
            parent, token = np.divmod(new, width)
            at[going] = len(self.tokens) + place
            self.tokens, self.parent = np.append(self.tokens, token), np.append(self.parent, parent)
            self.depth = np.append(self.depth, self.depth[parent] + 1)
            self.text = np.append(self.text, self.text[parent])
            left[going] += 1
            going = going[left[going] < end[going]]
        return at

    def apart(self) -> tuple[list[Tree], np.ndarray]:
        """The tree of each text, and the number that each node has in its own."""
        order = np.argsort(self.text, kind="stable")
        first = np.searchsorted(self.text[order], np.arange(len(self.n_trunk) + 1))
        own = np.empty_like(order)
        own[order] = np.arange(len(order)) - first[self.text[order]]
        above = np.where(self.parent < 0, -1, own[self.parent])
        parts = (np.split(x[order], first[1:-1]) for x in (self.tokens, above, self.depth))
        return [Tree(*columns, n) for *columns, n in zip(*parts, self.n_trunk.tolist(), strict=True)], own


def _flat(paths: Sequence[Tokens]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all paths, one after the other, and where those of each begin."""
    first = starts(np.fromiter(map(len, paths), np.int64, len(paths)))
    return np.fromiter(chain.from_iterable(paths), np.int64, first[-1]), first
