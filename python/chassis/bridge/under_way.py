"""What a piece of text leaves open for the expert, kept from text to text: the encodings of its beginnings, as they come
about whatever follows (`FOLLOWING`), and the tokens that may be under way."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate, compress, islice
from typing import TYPE_CHECKING

import numpy as np

from chassis.bridge.canonical import OTHERS, CanonicalMask
from chassis.bridge.leaves import Leaves
from chassis.bridge.stretches import ranges, starts
from chassis.bridge.tree import Tokens
from chassis_kernels import BridgeTable

if TYPE_CHECKING:  # made with this
    from chassis.bridge.plan import Plan

CELLS = 4_000_000  # tokens looked at at once
KEPT = 200_000  # beginnings of pieces whose encodings are kept


class UnderWay:
    """What a piece of text leaves open: the encodings of its beginnings, and the tokens that may be under way."""

    def __init__(self, leaves: Leaves, mask: CanonicalMask) -> None:
        self.leaves, self.mask = leaves, mask
        self._tokens, self._start = np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int64)  # of each option
        self._options: dict[int, int] = {}
        self._followed: dict[int, int] = {}
        self._known: dict[tuple[int, bytes], tuple[np.ndarray, np.ndarray]] = {}
        # Tuples, of which there are many: the garbage collector does not visit them.
        self._alone: dict[bytes, Tokens] = {}
        self._encodings: dict[bytes, tuple[Tokens, ...]] = {}
        self._moves: dict[int, tuple[str, ...]] = {}
        self._lengths: list[int] = mask.tokens.lengths.tolist()

    def alone(self, texts: list[bytes]) -> dict[bytes, Tokens]:
        """The encoding of each text as it comes about before nothing."""
        missing = [data for data in dict.fromkeys(texts) if data not in self._alone]
        self._alone.update(zip(missing, self.mask.tokens.tuples_of(list(map(bytes.decode, missing))), strict=True))
        return self._alone

    def encodings(self, beginnings: list[bytes]) -> dict[bytes, tuple[Tokens, ...]]:
        """The encodings of each beginning of a piece, as they come about before FOLLOWING; that of `alone` first."""
        if len(self._alone) > KEPT:
            self._alone.clear()
            self._encodings.clear()
        alone = self.alone(beginnings)
        missing = {data: alone[data] for data in beginnings if data not in self._encodings}
        self._encodings.update((data, (ids,)) for data, ids in missing.items())
        moves = self._moves_of({ids[-1] for ids in missing.values() if ids})
        moved = {data: ids for data, ids in missing.items() if ids and moves[ids[-1]]}
        self._encodings |= self._before_others(moved)
        return self._encodings

    def _moves_of(self, tokens: set[int]) -> dict[int, tuple[str, ...]]:
        """For each token what changes, if it follows, how the token's text is encoded. Patterns look ahead from the last
        token alone: a text that ends with it is encoded in one way before all else."""
        unknown = sorted(tokens - self._moves.keys())
        moves = self.mask.moves(unknown).tolist()
        self._moves.update((token, tuple(compress(OTHERS, own))) for token, own in zip(unknown, moves, strict=True))
        return self._moves

    def _before_others(self, alone: dict[bytes, Tokens]) -> dict[bytes, tuple[Tokens, ...]]:
        """The encodings of beginnings, `alone` first, and before what changes that of the last token, where one of their
        tokens ends with the beginning."""
        texts = [data.decode() + after for data, ids in alone.items() for after in self._moves[ids[-1]]]
        encoded, found = iter(zip(texts, self.mask.tokens.tuples_of(texts), strict=True)), {}
        for data, first in alone.items():
            own = [first]
            for text, ids in islice(encoded, len(self._moves[first[-1]])):
                ends = self._ends(ids, text)
                n = bisect_right(ends, len(data))
                if n and ends[n - 1] == len(data) and ids[:n] not in own:
                    own.append(ids[:n])
            found[data] = tuple(own)
        return found

    def _ends(self, ids: Tokens, text: str) -> list[int]:
        """Bytes [n] of the text at which its tokens end; an unknown token has none of its own, these are reported."""
        sizes = [self._lengths[index] for index in ids]
        return list(accumulate(sizes)) if all(sizes) else self.mask.tokens.encode(text).ends.tolist()

    def options(self, last: np.ndarray, begun: np.ndarray) -> np.ndarray:
        """Numbers [m] of the tokens that can follow the tokens `last` [m] (-1: nothing before), begin with the nodes
        `begun` [m] of `leaves.prefixes` and go on; -1 where there are none."""
        prefixes = self.leaves.prefixes
        n_nodes = len(prefixes.low)

        def sizes(keys: np.ndarray) -> np.ndarray:
            return prefixes.high[keys % n_nodes] - prefixes.low[keys % n_nodes]

        def listed(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            after, nodes = np.divmod(keys, n_nodes)
            asked, row = np.unique(after - 1, return_inverse=True)
            blocked = self.mask.rows(asked.clip(0).tolist()) & (asked >= 0)[:, None]
            begin, of = starts(sizes(keys)), np.repeat(np.arange(len(keys)), sizes(keys))
            tokens = self.leaves.order[np.arange(begin[-1]) + (prefixes.low[nodes] - begin[:-1])[of]]
            kept = ~blocked[row[of], tokens]
            return tokens[kept], of[kept]

        return self._numbers(self._options, (last + 1) * n_nodes + begun, sizes, listed)

    def followed(
        self, options: np.ndarray, begun: np.ndarray, previous: np.ndarray, table: BridgeTable, base: CanonicalMask
    ) -> np.ndarray:
        """Numbers [m] of what is left of `options` [m] without the tokens of which the rest, as `table` tells it, cannot
        follow the base tokens `previous` [m] (-1: nothing before); -1 where nothing is left. `begun` as for `options`."""
        width = base.tokens.width + 1
        keys, cut = options * width + previous + 1, np.zeros(options.max(initial=-1) + 1, dtype=np.int64)
        cut[options] = self.leaves.prefixes.size[begun]
        start, ids = table.start.numpy(), table.ids.numpy()

        def sizes(keys: np.ndarray) -> np.ndarray:
            return np.diff(self._start)[keys // width] + width  # a row of the mask too

        def listed(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            number, before = np.divmod(keys, width)
            asked, row = np.unique(before - 1, return_inverse=True)
            blocked = base.rows(asked.clip(0).tolist()) & (asked >= 0)[:, None]
            tokens, n = self.tokens(number)
            of = np.repeat(np.arange(len(keys)), n)
            entries, token = ranges(start, self.leaves.row(tokens, cut[number][of]))
            kept = np.zeros(len(tokens), dtype=bool)
            kept[token[~blocked[row[of[token]], ids[entries]]]] = True
            return tokens[kept], of[kept]

        return self._numbers(self._followed, keys, sizes, listed)

    def _numbers(self, known: dict[int, int], keys: np.ndarray, sizes: Callable, listed: Callable) -> np.ndarray:
        """Numbers [m] of the lists of `keys` [m]; those not `known` are made: `listed` gives tokens and which key each is
        for, `sizes` how many are looked at. -1 for empty ones."""
        keys, inverse = np.unique(keys, return_inverse=True)
        missing = np.array([key for key in keys.tolist() if key not in known], dtype=np.int64)
        ends = sizes(missing).cumsum()
        for part in np.split(missing, np.searchsorted(ends, np.arange(CELLS, ends[-1], CELLS))) if len(missing) else ():
            tokens, of = listed(part)
            left = np.bincount(of, minlength=len(part))
            number = np.where(left > 0, len(self._start) - 2 + (left > 0).cumsum(), -1)
            known.update(zip(part.tolist(), number.tolist(), strict=True))
            self._tokens = np.concatenate([self._tokens, tokens.astype(np.int32)])
            self._start = np.concatenate([self._start, self._start[-1] + left[left > 0].cumsum()])
        return np.array([known[key] for key in keys.tolist()], dtype=np.int64)[inverse]

    def listed(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """The tokens under way in each state `begun` [m] of a plan, one after the other, and how many each has [m]."""
        options = self.options(plan.tree.tokens[plan.begun], plan.so_far) if plan.options is None else plan.options
        return self.tokens(options)

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
