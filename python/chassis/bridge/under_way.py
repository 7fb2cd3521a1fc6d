"""What a piece of text leaves open for the expert, kept from text to text: the encodings of its beginnings, as they come
about whatever follows (`FOLLOWING`), and the tokens that may be under way."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import numpy as np

from chassis.bridge.canonical import CanonicalMask
from chassis.bridge.leaves import Leaves
from chassis.bridge.pretokens import FOLLOWING
from chassis.bridge.stretches import ranges, starts

CELLS = 4_000_000  # tokens looked at at once
KEPT = 200_000  # beginnings of pieces whose encodings are kept
Tokens = tuple[int, ...]


class UnderWay:
    """What a piece of text leaves open: the encodings of its beginnings, and the tokens that may be under way."""

    def __init__(self, leaves: Leaves, mask: CanonicalMask) -> None:
        self.leaves, self.mask = leaves, mask
        self._tokens, self._start = np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int64)  # of each option
        self._options: dict[int, int] = {}
        self._known: dict[tuple[int, bytes], tuple[np.ndarray, np.ndarray]] = {}
        # Tuples, of which there are many: the garbage collector does not visit them.
        self._encodings: dict[bytes, tuple[Tokens, ...]] = {}
        self._tails: dict[bytes, tuple[Tokens, tuple[Tokens, ...]]] = {}
        self._stays: dict[int, bool] = {}
        self._lengths: list[int] = mask.tokens.lengths.tolist()

    def encodings(self, beginnings: list[bytes]) -> dict[bytes, tuple[Tokens, ...]]:
        """The encodings of each beginning of a piece, as they come about before FOLLOWING; as at the end of a text first."""
        if len(self._encodings) > KEPT:
            self._encodings.clear()
            self._tails.clear()
        missing = [data for data in dict.fromkeys(beginnings) if data not in self._encodings]
        alone = self.mask.tokens.tuples_of(list(map(bytes.decode, missing)))
        self._encodings.update((data, (ids,)) for data, ids in zip(missing, alone, strict=True))
        moved = self._moved({ids[-1] for ids in alone if ids})
        self._before_others([data for data, ids in zip(missing, alone, strict=True) if ids and ids[-1] in moved])
        return self._encodings

    def _moved(self, tokens: set[int]) -> set[int]:
        """Those tokens that are not what their text is encoded as, whatever follows. Patterns look ahead from the last token
        alone: a text that ends with another token is encoded in one way."""
        texts = self.mask.texts
        asked = [token for token in tokens if token not in self._stays and texts[token] is not None]
        found = iter(self.mask.tokens.tuples_of([texts[token] + after for token in asked for after in FOLLOWING]))
        self._stays |= dict.fromkeys(tokens - self._stays.keys(), False)
        for token in asked:
            self._stays[token] = all([next(found)[:1] == (token,) for _ in FOLLOWING])
        return {token for token in tokens if not self._stays[token]}

    def _before_others(self, beginnings: list[bytes]) -> None:
        """Add what becomes of beginnings before other texts than none. The last two tokens, and white space before them,
        tell that, unless alone they are not encoded as they are there."""
        tails = {data: self._tail(data) for data in beginnings}
        missing = [tail for tail in dict.fromkeys(tails.values()) if tail and tail not in self._tails]
        alone = self.mask.tokens.tuples_of(list(map(bytes.decode, missing)))
        for tail, ids, others in zip(missing, alone, self._others(missing), strict=True):
            self._tails[tail] = ids, tuple(other for other in others if other != ids)
        whole = []
        for data, tail in tails.items():
            (ids,), (alone, others) = self._encodings[data], self._tails.get(tail, ((), ()))
            if tail and ids[-len(alone) :] == alone:
                self._encodings[data] = (ids, *(ids[: -len(alone)] + other for other in others))
            else:
                whole.append(data)
        for data, others in zip(whole, self._others(whole), strict=True):
            self._encodings[data] += tuple(ids for ids in others if ids != self._encodings[data][0])

    def _tail(self, data: bytes) -> bytes:
        """The last two tokens of a beginning, and as many more as are white space and the one before; b"" if unknown."""
        ids, bytes_of = self._encodings[data][0], self.mask.tokens.bytes
        n = min(2, len(ids))
        while n < len(ids) and bytes_of[ids[-n]].isspace():
            n += 1
        size = sum(self._lengths[index] for index in ids[-n:])
        tail = data[-size:] if size else b""
        return tail if tail and (tail[0] & 0xC0) != 0x80 else b""

    def _others(self, beginnings: list[bytes]) -> list[list[Tokens]]:
        """The encodings of each beginning before FOLLOWING[1:], where one of its tokens ends with it."""
        texts = [data.decode() + after for data in beginnings for after in FOLLOWING[1:]]
        encoded, found = self.mask.tokens.tuples_of(texts), []
        for place, data in enumerate(beginnings):
            own: list[Tokens] = []
            for i in range(place * (len(FOLLOWING) - 1), (place + 1) * (len(FOLLOWING) - 1)):
                ends = self._ends(encoded[i], texts[i])
                n = bisect_right(ends, len(data))
                if n and ends[n - 1] == len(data) and encoded[i][:n] not in own:
                    own.append(encoded[i][:n])
            found.append(own)
        return found

    def _ends(self, ids: Tokens, text: str) -> list[int]:
        """Bytes [n] of the text at which its tokens end; an unknown token has none of its own, these are reported."""
        sizes = [self._lengths[index] for index in ids]
        return list(accumulate(sizes)) if all(sizes) else self.mask.tokens.encode(text).ends.tolist()

    def options(self, last: np.ndarray, begun: np.ndarray) -> np.ndarray:
        """Numbers [m] of the tokens that can follow the tokens `last` [m] (-1: nothing before), begin with the nodes
        `begun` [m] of `leaves.prefixes` and go on; -1 where there are none."""
        prefixes = self.leaves.prefixes
        keys, inverse = np.unique((last + 1) * len(prefixes.low) + begun, return_inverse=True)
        missing = np.array([key for key in keys.tolist() if key not in self._options], dtype=np.int64)
        after, nodes = np.divmod(missing, len(prefixes.low))
        asked, which = np.unique(after - 1, return_inverse=True)
        sizes = prefixes.high[nodes] - prefixes.low[nodes]
        parts = np.split(np.arange(len(missing)), np.searchsorted(sizes.cumsum(), np.arange(CELLS, sizes.sum(), CELLS)))
        for part in parts if len(missing) else ():
            rows, row = np.unique(which[part], return_inverse=True)
            blocked = self.mask.rows(asked[rows].clip(0).tolist()) & (asked[rows] >= 0)[:, None]
            begin, of = starts(sizes[part]), np.repeat(np.arange(len(part)), sizes[part])
            tokens = self.leaves.order[np.arange(begin[-1]) + (prefixes.low[nodes[part]] - begin[:-1])[of]]
            kept = ~blocked[row[of], tokens]
            left = np.bincount(of[kept], minlength=len(part))
            number = np.where(left > 0, len(self._start) - 2 + (left > 0).cumsum(), -1)
            self._options.update(zip(missing[part].tolist(), number.tolist(), strict=True))
            self._tokens = np.concatenate([self._tokens, tokens[kept].astype(np.int32)])
            self._start = np.concatenate([self._start, self._start[-1] + left[left > 0].cumsum()])
        return np.array([self._options[key] for key in keys.tolist()], dtype=np.int64)[inverse]

    def tokens(self, options: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of each of `options` [m], one after the other, and how many each has [m]."""
        places, _ = ranges(self._start, options)
        return self._tokens[places].astype(np.int64), np.diff(self._start)[options]

    def after(self, last: int, begun: bytes) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that can follow token `last`, begin with `begun` and go on; the rows of their residuals."""
        tokens, rows = self.leaves.under_way(begun)
        if last < 0 or not len(tokens):
            return tokens, rows
        key = last, begun
        if key not in self._known:
            kept = ~self.mask.rows([last])[0][tokens]
            self._known[key] = tokens[kept], rows[kept]
        return self._known[key]
