"""What can be left of an expert token: the rows of a bridge's table, and the tokens that begin with given bytes.

Row t < V_E of the table is expert token t; the rows after them are *residuals*, the proper ends s_t[k:] of its tokens. When
the base's position lies inside an expert token, behind its first bytes u, the tokens that may be under way are those that
begin with u (one range of the sorted vocabulary), and what follows is their residual.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import cached_property

import numpy as np

from chassis.bridge.prefixes import Prefixes
from chassis.text.token_bytes import TokenBytes


class Leaves:
    """`strings` [rows]: bytes of every row, b"" for special tokens; `n_expert` = V_E rows of tokens come first."""

    def __init__(self, expert: TokenBytes) -> None:
        self.n_expert = expert.width
        self.strings: list[bytes] = list(expert.bytes)
        self.order = np.array(sorted(np.flatnonzero(expert.is_text).tolist(), key=expert.bytes.__getitem__), dtype=np.int64)
        self._sorted = [expert.bytes[index] for index in self.order.tolist()]
        self._first = np.zeros(expert.width + 1, dtype=np.int64)
        self._first[1:] = np.cumsum(np.maximum(expert.lengths - 1, 0))
        rests = [data[cut:] for data in expert.bytes for cut in range(1, len(data))]
        number = {rest: row for row, rest in enumerate(dict.fromkeys(rests), len(self.strings))}
        self.strings += number
        self._rows = np.fromiter(map(number.__getitem__, rests), np.int32, len(rests))
        self._under_way: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.strings)

    def row(self, tokens: np.ndarray, cut: np.ndarray | int) -> np.ndarray:
        """Rows [n] of what is left of `tokens` [n] after their first `cut` bytes, 0 <= cut < their lengths."""
        tokens, cut = np.asarray(tokens, dtype=np.int64), np.asarray(cut)
        place = np.where(cut > 0, self._first[tokens] + cut - 1, 0)
        return np.where(cut > 0, self._rows[place] if len(self._rows) else 0, tokens)

    def under_way(self, begun: bytes) -> tuple[np.ndarray, np.ndarray]:
        """The expert tokens that begin with `begun` and go on, and the rows of their residuals."""
        if begun not in self._under_way:
            low, high = self.range_of(begun)
            while low < high and self._sorted[low] == begun:
                low += 1
            tokens = self.order[low:high]
            self._under_way[begun] = tokens, self.row(tokens, np.full(len(tokens), len(begun)))
        return self._under_way[begun]

    @cached_property
    def prefixes(self) -> Prefixes:
        """The beginnings of the tokens in `order`; made when first asked for."""
        return Prefixes(self._sorted)

    def range_of(self, begun: bytes) -> tuple[int, int]:
        """The tokens that begin with `begun` are order[low:high]."""
        return prefix_range(self._sorted, begun)


def prefix_range(ordered: list[bytes], begun: bytes) -> tuple[int, int]:
    """[low, high) of the byte strings in `ordered`, sorted, that begin with `begun`."""
    after = begun.rstrip(b"\xff")
    high = bisect_left(ordered, after[:-1] + bytes([after[-1] + 1])) if after else len(ordered)
    return bisect_left(ordered, begun), high
