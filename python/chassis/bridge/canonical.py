"""Which tokens cannot follow a token in the encoding of a text.

Token b is blocked after `previous` unless enc(previous b c) begins with [previous, b] for some c in FOLLOWING: nothing, or a
rare letter, digit or sign, since patterns look one character ahead ("   x" is "  " and " x").

For BPE this needs no encoding. Both tokens are taken apart again, the merge of highest rank first; if at some point the two
pieces that meet have a merge of a rank below that of the piece just taken apart, BPE would have joined them before, and
[previous, b] never comes about. Only tokens of which a beginning has a merge with an end of `previous` need be tried. Other
models, and BPE with merges out of order, are asked by encoding every pair.

Parts of characters are judged by the UTF-8 they make: what begins inside a character can only follow one that broke off.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from chassis.bridge.merges import Merges
from chassis.bridge.pretokens import FOLLOWING, PreTokens, Splits
from chassis.bridge.stretches import starts
from chassis.text.token_bytes import TokenBytes
from chassis_kernels import BlockedTokens

OTHERS = FOLLOWING[1:]  # than nothing
CONTINUATION = range(0x80, 0xC0)
EMPTY = np.zeros(0, dtype=np.int32)
CELLS = 4_000_000  # pairs of tokens looked at at once
LISTED = 16_000_000  # blocked tokens whose lists are kept


class CanonicalMask:
    """`blocked_after(previous)`: the text tokens that cannot follow; kept, once asked for. `splits`, `alone` and `moves`:
    what an earlier one has found out, with `find_splits`, when it was made, and with `find_moves`."""

    def __init__(
        self,
        tokens: TokenBytes,
        *,
        by_merges: bool = True,
        splits: Splits | None = None,
        alone: np.ndarray | None = None,
        moves: np.ndarray | None = None,
    ) -> None:
        self.tokens, self.splits = tokens, splits
        self.texts = [_text(data) if ok else None for data, ok in zip(tokens.bytes, tokens.is_text, strict=True)]
        known = [index for index, text in enumerate(self.texts) if text is not None]
        if alone is None:
            encoded, alone = tokens.ids_of([self.texts[index] for index in known]), np.zeros(tokens.width, dtype=bool)
            alone[[index for index, ids in zip(known, encoded, strict=True) if ids == [index]]] = True
        self.alone = alone  # [V] bool: the text of the token is encoded as the token
        self.whole = np.zeros(tokens.width, dtype=bool)
        self.whole[known] = True
        self._inside = np.array([bool(data) and data[0] in CONTINUATION for data in tokens.bytes])
        self._moves = moves
        self._merges = Merges.read(tokens) if by_merges else None
        self._pretokens = PreTokens(tokens, self.texts) if self._merges and splits is None else None
        self._known: dict[int, np.ndarray] = {}  # packed: most tokens are blocked after most tokens
        self._lists: dict[int, np.ndarray] = {}
        self._step = max(1, CELLS // tokens.width)

    def find_splits(self) -> Splits | None:
        """Ask the pre-tokenizer about all tokens, not only those that come; None for models that are asked by encoding."""
        if self.splits is None and self._pretokens is not None:
            self.splits = self._pretokens.splits()
        return self.splits

    def find_moves(self) -> np.ndarray:
        """The `moves` of all tokens, not only of those that come."""
        if self._moves is None:
            self._moves = self.moves(range(self.tokens.width))
        return self._moves

    def moves(self, tokens: Sequence[int]) -> np.ndarray:
        """For each of `tokens` [n] and of FOLLOWING but nothing: whether it changes, if it follows, how the token's text is
        encoded, [n, 3] bool. True also where that text alone is not encoded as the token."""
        if self._moves is not None:
            return self._moves[tokens]
        moves = np.ones((len(tokens), len(OTHERS)), dtype=bool)
        asked = [(place, index) for place, index in enumerate(tokens) if self.alone[index]]
        found = iter(self.tokens.tuples_of([self.texts[index] + after for _, index in asked for after in OTHERS]))
        for place, index in asked:
            moves[place] = [next(found)[:1] != (index,) for _ in OTHERS]
        return moves

    def blocked_after(self, previous: int) -> np.ndarray:
        """Ids [n] of the text tokens that cannot follow token `previous`."""
        return np.flatnonzero(self.rows([previous])[0])

    def rows(self, previous: Sequence[int]) -> np.ndarray:
        """Whether each token cannot follow each of `previous` [n], bool [n, V]."""
        missing, step = [index for index in dict.fromkeys(previous) if index not in self._known], self._step
        for asked in (missing[i : i + step] for i in range(0, len(missing), step)):
            self._known.update(zip(asked, np.packbits(self._blocked(asked) & self.tokens.is_text, axis=1), strict=True))
        packed = np.array([self._known[index] for index in previous])
        return np.unpackbits(packed, axis=1, count=self.tokens.width).view(bool)

    def lists(self, previous: Sequence[int] | np.ndarray) -> tuple[BlockedTokens, torch.Tensor]:
        """Blocked lists of the tokens in `previous` and which of them each has, [n] int64; -1 (nothing before): none."""
        asked, places = np.unique(np.asarray(previous, dtype=np.int64), return_inverse=True)
        nothing = int(np.searchsorted(asked, 0))
        asked = asked[nothing:].tolist()
        if sum(map(len, self._lists.values())) > LISTED:
            self._lists.clear()
        missing = [index for index in asked if index not in self._lists]
        for part in (missing[i : i + self._step] for i in range(0, len(missing), self._step)):
            row, tokens = np.divmod(np.flatnonzero(self.rows(part)), self.tokens.width)  # nonzero takes five times as long
            lists = np.split(tokens.astype(np.int32), np.searchsorted(row, np.arange(1, len(part))))
            self._lists.update(zip(part, lists, strict=True))
        lists = [self._lists[index] for index in asked]
        start, tokens = starts(np.array([len(own) for own in lists], dtype=np.int64)), np.concatenate([EMPTY, *lists])
        return BlockedTokens(*map(torch.from_numpy, (start, tokens)), self.tokens.width), torch.from_numpy(places - nothing)

    def _blocked(self, previous: Sequence[int]) -> np.ndarray:
        blocked, ordinary = np.zeros((len(previous), self.tokens.width), dtype=bool), []
        for row, index in enumerate(previous):
            broken_off = _broken_off(self.tokens.bytes[index]) if self.tokens.is_text[index] else None
            if broken_off:  # inside a character: its next byte must follow
                blocked[row] = ~self._inside
            elif broken_off is not None and self.texts[index] is None:
                blocked[row] = self._inside
            elif broken_off is not None:  # None: the token tells not whether the character is complete
                ordinary.append(row)
        asked = np.array([previous[row] for row in ordinary], dtype=np.int64)
        if len(asked):
            blocked[ordinary] = self._inside | (self.whole & ~self.alone) | self._apart(asked)
        return blocked

    def _apart(self, previous: np.ndarray) -> np.ndarray:
        """Whole tokens that do not come about after `previous` [n]."""
        if self._merges is None:
            return np.array([self._by_encoding(index) for index in previous.tolist()])
        if self.splits is None:
            split, joined = map(np.array, zip(*map(self._pretokens.after, previous.tolist()), strict=True))
        else:
            split, joined = self.splits.after(previous)
        return self.whole & ~split & (~joined | self._merges.would_join(previous))

    def _by_encoding(self, previous: int) -> np.ndarray:
        """The definition: encode every pair, with every following character."""
        tried = np.flatnonzero(self.alone)
        possible = ~self.alone
        for after in FOLLOWING:
            rest = tried[~possible[tried]].tolist()
            pairs = self.tokens.ids_of([self.texts[previous] + self.texts[index] + after for index in rest])
            possible[[index for index, ids in zip(rest, pairs, strict=True) if ids[:2] == [previous, index]]] = True
        return ~possible


def _text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _broken_off(data: bytes) -> bool | None:
    """Whether the bytes end inside a character; None if they hold the last bytes of one whose beginning is not there."""
    for back, byte in enumerate(reversed(data[-4:]), 1):
        if byte < 0x80:
            return False
        if byte >= 0xC0:
            return back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
    return None if len(data) < 4 else False
