"""The beginnings of sorted byte strings as a tree in arrays, so that many places of a text are followed at once.

Node 0 is the empty beginning. Nodes are numbered by length and then in order, so that the keys `parent * 256 + byte` of the
nodes 1, 2, ... are sorted, and one search finds the children of many nodes.
"""

from __future__ import annotations

import numpy as np


class Prefixes:
    """Strings `low`..`high` - 1 [n] of the list begin with the bytes of a node and go on; `size` [n] of these bytes."""

    def __init__(self, ordered: list[bytes]) -> None:
        data = np.frombuffer(b"".join(ordered), dtype=np.uint8)
        sizes = np.fromiter(map(len, ordered), np.int64, len(ordered))
        begin = sizes.cumsum() - sizes
        low, high, keys = [np.zeros(1, np.int64)], [np.full(1, len(ordered))], []
        which, node, n = np.arange(len(ordered)), np.zeros(len(ordered), dtype=np.int64), 1
        for depth in range(int(sizes.max(initial=0))):
            longer = sizes[which] > depth
            which, node = which[longer], node[longer]
            key = node * 256 + data[begin[which] + depth]
            new = np.append(True, key[1:] != key[:-1])
            starts = np.flatnonzero(new)
            ended = np.add.reduceat(sizes[which] == depth + 1, starts)  # these come first
            keys.append(key[starts])
            low.append(which[starts] + ended)
            high.append(which[np.append(starts[1:], len(which)) - 1] + 1)
            node = n + new.cumsum() - 1
            n += len(starts)
        self.low, self.high = np.concatenate(low), np.concatenate(high)
        self.size = np.repeat(np.arange(len(low)), [len(part) for part in low])
        self._keys = np.concatenate([np.zeros(0, np.int64), *keys])

    def child(self, nodes: np.ndarray, byte: np.ndarray) -> np.ndarray:
        """The node [n] of the bytes of `nodes` [n] and one more, `byte` [n]; -1 where no string begins so."""
        keys = nodes * 256 + byte
        place = np.searchsorted(self._keys, keys)
        return np.where(self._keys[np.minimum(place, len(self._keys) - 1)] == keys, place + 1, -1)
