"""Which states of the expert a text needs, so that every base position is read from the text before it alone.

Whether the expert's encoding of a whole text has a token end at some byte depends on the text behind it. So at each base
position p all is kept that the text up to p leaves open: the encodings that end at p, whatever follows first (`FOLLOWING`),
and for each byte e before p the encodings that end at e, from which a token may be under way that begins with the bytes
e..p. Of these tokens only those count that can follow the last token of the encoding (`CanonicalMask`), mostly none.

The encodings form a tree: a trunk, which encodes the whole text, with short branches. They are made piece by piece, a piece
beginning at each space that follows something else; there, no tokenizer in use joins tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from chassis.bridge.cuts import pretoken_begins, resumed, sure_places
from chassis.bridge.stretches import distinct, ranges, starts
from chassis.bridge.tree import Tree, Trees
from chassis.bridge.under_way import UnderWay
from chassis.text.token_bytes import Encoded, TokenBytes

PIECE_ENDS = re.compile(rb"[^ \t\r\n] ")
Followed = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
WHITE = np.frombuffer(b" \t\r\n", dtype=np.uint8)


@dataclass(frozen=True, eq=False)
class Plan:
    """A text as the base's tokens, and for each of them what the expert may be doing where it begins."""

    data: bytes
    base_ids: np.ndarray  # [n] int64
    previous: np.ndarray  # [n] int64, the base token before each; -1 where a text begins
    begins: np.ndarray  # [n] int64, byte at which each base token begins
    tree: Tree
    ended: np.ndarray  # [c] states in which the text before a base token is encoded, for one base token after the other
    ended_start: np.ndarray  # [n + 1] where those of each base token begin
    begun: np.ndarray  # [m] states before a token under way, in the same way
    begun_start: np.ndarray  # [n + 1]
    so_far: np.ndarray  # [m] the bytes of the token under way up to here, as a node of the expert's `Leaves.prefixes`
    sizes: np.ndarray  # [m] how many these are
    options: np.ndarray | None = None  # [m] of `make_plans(followed=...)`: numbers of lists of the bridge's `UnderWay`

    def __len__(self) -> int:
        return len(self.base_ids)

    @property
    def expert_ids(self) -> np.ndarray:
        """The expert's encoding of the text, [n_trunk]."""
        return self.tree.tokens[1 : self.tree.n_trunk + 1]

    @cached_property
    def complete(self) -> tuple[tuple[int, ...], ...]:
        """[n] states in which the text before the base token is encoded."""
        return _cut(self.ended.tolist(), self.ended_start)

    @cached_property
    def under_way(self) -> tuple[tuple[tuple[int, bytes], ...], ...]:
        """[n] states before a token under way, and its bytes so far."""
        ends = np.repeat(self.begins, np.diff(self.begun_start))
        begun = [self.data[end - size : end] for end, size in zip(ends.tolist(), self.sizes.tolist(), strict=True)]
        return _cut(list(zip(self.begun.tolist(), begun, strict=True)), self.begun_start)

    @staticmethod
    def join(plans: Sequence[Plan]) -> Plan:
        """Several texts as one plan, states and positions of one after those of the other; it has no trunk."""
        if len(plans) == 1:
            return plans[0]
        first = np.cumsum([0, *(len(plan.tree) for plan in plans)])
        moved = [np.where(plan.tree.parent < 0, -1, plan.tree.parent + i) for plan, i in zip(plans, first, strict=False)]
        tokens, depth = (np.concatenate([getattr(plan.tree, name) for plan in plans]) for name in ("tokens", "depth"))
        byte = np.cumsum([0, *(len(plan.data) for plan in plans)])
        same = ["base_ids", "previous", "so_far", "sizes", *(["options"] if plans[0].options is not None else [])]
        return Plan(
            data=b"".join(plan.data for plan in plans),
            begins=np.concatenate([plan.begins + i for plan, i in zip(plans, byte, strict=False)]),
            tree=Tree(tokens, np.concatenate(moved), depth, 0),
            ended=np.concatenate([plan.ended + i for plan, i in zip(plans, first, strict=False)]),
            ended_start=starts(np.concatenate([np.diff(plan.ended_start) for plan in plans])),
            begun=np.concatenate([plan.begun + i for plan, i in zip(plans, first, strict=False)]),
            begun_start=starts(np.concatenate([np.diff(plan.begun_start) for plan in plans])),
            **{name: np.concatenate([getattr(plan, name) for plan in plans]) for name in same},
        )


def _cut(values: list, start: np.ndarray) -> tuple[tuple, ...]:
    return tuple(tuple(values[a:b]) for a, b in pairwise(start.tolist()))


def make_plans(
    expert: TokenBytes, base: TokenBytes, under_way: UnderWay, texts: Sequence[str], followed: Followed | None = None
) -> list[Plan]:
    """Plans for texts that both tokenizers read as they are (see `counting.joint_text`).

    `followed` (options [m], nodes begun [m], base tokens before [m]) gives what is left of `UnderWay.options` without tokens
    of which the rest cannot follow. States where nothing is left are then left out.
    """
    return _Draft(expert, base.encode_batch(texts), under_way).plans(followed) if texts else []


class _Draft:
    """What is known of plans before any beginning is encoded. The texts stand one after the other, each with a line feed."""

    def __init__(self, expert: TokenBytes, encoded: Sequence[Encoded], under_way: UnderWay) -> None:
        self.expert, self.under_way = expert, under_way
        self.encoded, self.data = encoded, b"".join(own.data + b"\n" for own in encoded)
        byte = np.frombuffer(self.data, dtype=np.uint8)
        first = starts(np.array([len(own.data) + 1 for own in encoded]))
        self.begins = np.concatenate([_begins(own) + at for own, at in zip(encoded, first, strict=False)])
        self.places, first_at, self.which, n_at = np.unique(self.begins, True, True, True)
        # The base token before a place; none where several begin, of which all but one are empty: it rules nothing out.
        self.before = np.where(n_at == 1, np.concatenate([_previous(own) for own in encoded])[first_at], -1)
        between = (byte & 0xC0) != 0x80  # characters
        pieces = distinct(np.append(_pieces(byte), first[:-1]), len(byte))
        self.text = np.searchsorted(first, pieces, side="right") - 1  # of a piece
        ends = np.append(pieces[1:], len(byte)) - np.append(self.text[1:] > self.text[:-1], True)
        # The end of a piece belongs to it: that the next one begins there is not known from the text before.
        own = np.searchsorted(first, self.places, side="right") - 1
        piece = np.maximum(np.searchsorted(pieces, self.places) - 1, np.searchsorted(pieces, first[own]))
        self.begun_tokens = e, p, _ = _begun_tokens(byte, pieces, ends, between, self.places, under_way)
        self.inside = ~between[self.places]
        # A slot is a beginning of a piece: its end and, since a piece ends where the next begins, the number of the piece.
        self.slot_ended, self.slot_begun = (self.places + piece)[~self.inside], e + piece[p]
        self.slots = distinct(np.append(self.slot_ended, self.slot_begun), len(byte) + len(pieces))
        whole = [self.data[a:b] for a, b in zip(pieces.tolist(), ends.tolist(), strict=True)]
        known = under_way.alone(whole)
        self.trees = Trees([known[part] for part in whole], self.text)
        # Beginnings are taken up where the encoding of the trunk can be: `roots`, the states there.
        of = np.searchsorted(pieces + np.arange(len(pieces)), self.slots, side="right") - 1
        nodes, token_ends = self.trees.trunk_ends(expert.lengths, pieces, ends)
        pretokens = pretoken_begins(expert, [own.data.decode() for own in encoded], byte, first[:-1])
        begin = resumed(self.slots - of, of, pieces, sure_places(byte, pretokens, token_ends), byte)
        at = np.searchsorted(token_ends, begin, side="right") - 1
        self.roots = np.where(begin == pieces[of], self.trees.roots[of], np.append(nodes, 0)[at])
        cuts, number = zip(begin.tolist(), (self.slots - of).tolist(), strict=True), {}
        own = (number.setdefault(self.data[a:b], len(number)) for a, b in cuts)
        self.beginning = np.fromiter(own, np.int64, len(self.slots))  # the number of each slot's
        self.beginnings = list(number)

    def plans(self, followed: Followed | None) -> list[Plan]:
        expert, under_way, grown = self.expert, self.under_way, self.trees
        data, places, which, inside = self.data, self.places, self.which, self.inside
        (e, p, node), slots = self.begun_tokens, self.slots
        known = under_way.encodings(self.beginnings)
        found = [known[beginning] for beginning in self.beginnings]
        encodings = [path for paths in found for path in paths]
        # A path is an encoding of the beginning that a slot is, from its root.
        encoding, slot = ranges(starts(np.array([len(paths) for paths in found])), self.beginning)
        path_start, roots = np.searchsorted(slot, np.arange(len(slots) + 1)), self.roots[slot]
        last = np.array([path[-1] if path else -1 for path in encodings], dtype=np.int64)[encoding]
        last = np.where(last < 0, grown.tokens[roots], last)

        path_begun, of_begun = ranges(path_start, np.searchsorted(slots, self.slot_begun))
        options = under_way.options(last[path_begun], node[of_begun])
        begun = np.flatnonzero(options >= 0)
        if followed is not None:
            options[begun] = followed(options[begun], node[of_begun[begun]], self.before[p[of_begun[begun]]])
            begun = begun[options[begun] >= 0]
        path_begun, of_begun, options = path_begun[begun], of_begun[begun], options[begun]
        path_ended, of_ended = ranges(path_start, np.searchsorted(slots, self.slot_ended))
        place_ended = np.flatnonzero(~inside)[of_ended]
        if inside.any():  # a token may also have ended within a character
            more = [
                (p[i], path, expert.ids_by_bytes[token][0])
                for i in np.flatnonzero(inside[p]).tolist()
                if (token := data[e[i] : places[p[i]]]) in expert.ids_by_bytes
                for path in range(*path_start[np.searchsorted(slots, self.slot_begun[i]) + np.arange(2)].tolist())
            ]
            place_ended = np.concatenate([place_ended, [place for place, _, _ in more]]).astype(np.int64)
            path_ended = np.concatenate([path_ended, len(roots) + np.arange(len(more))])
            roots = np.concatenate([roots, roots[[path for _, path, _ in more]]])
            longer = [(*encodings[encoding[path]], token) for _, path, token in more]
            encoding = np.concatenate([encoding, len(encodings) + np.arange(len(more))])
            encodings += longer

        needed = distinct(np.append(path_ended, path_begun), len(roots))
        state = np.zeros(len(roots), dtype=np.int64)
        state[needed] = grown.grow(roots[needed], encodings, encoding[needed])
        n_states = len(grown.tokens)
        place_ended, ended = np.divmod(np.unique(place_ended * n_states + state[path_ended]), n_states)
        order = np.lexsort((state[path_begun], e[of_begun], p[of_begun]))
        of_begun, path_begun, options = of_begun[order], path_begun[order], options[order]
        take_ended, of = ranges(np.searchsorted(place_ended, np.arange(len(places) + 1)), which)
        take_begun, of_ = ranges(np.searchsorted(p[of_begun], np.arange(len(places) + 1)), which)
        bounds = np.arange(len(which) + 1)
        ended_start, begun_start = np.searchsorted(of, bounds), np.searchsorted(of_, bounds)
        trees, own = grown.apart()
        ended, begun = own[ended[take_ended]], own[state[path_begun][take_begun]]
        so_far, sizes = node[of_begun][take_begun], (places[p] - e)[of_begun][take_begun]
        options = options[take_begun]
        tokens, plans = starts(np.array([len(encoded) for encoded in self.encoded])), []
        for encoded, tree, (first, last) in zip(self.encoded, trees, pairwise(tokens.tolist()), strict=True):
            of_ended, of_begun = (slice(start[first], start[last]) for start in (ended_start, begun_start))
            plan = Plan(
                data=encoded.data,
                base_ids=encoded.ids,
                previous=_previous(encoded),
                begins=_begins(encoded),
                tree=tree,
                ended=ended[of_ended],
                ended_start=ended_start[first : last + 1] - ended_start[first],
                begun=begun[of_begun],
                begun_start=begun_start[first : last + 1] - begun_start[first],
                so_far=so_far[of_begun],
                sizes=sizes[of_begun],
                options=None if followed is None else options[of_begun],
            )
            plans.append(plan)
        return plans


def _begins(encoded: Encoded) -> np.ndarray:
    """Where its tokens begin, [n]."""
    return np.append(0, encoded.ends)[: len(encoded)]


def _previous(encoded: Encoded) -> np.ndarray:
    """The token before each of its tokens, [n]; -1 before the first."""
    return np.append(-1, encoded.ids)[: len(encoded)]


def _begun_tokens(
    byte: np.ndarray, pieces: np.ndarray, ends: np.ndarray, between: np.ndarray, places: np.ndarray, under_way: UnderWay
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(e, p, node): bytes e between characters behind which a token may have begun that is under way at places[p], in the
    same piece; node of the bytes in between. Within a character also tokens that end there."""
    prefixes = under_way.leaves.prefixes
    number = np.full(len(byte), -1)
    number[places] = np.arange(len(places))
    e = np.flatnonzero(between)
    end = ends[np.searchsorted(pieces, e, side="right") - 1]
    at, node, found = e, np.zeros_like(e), []
    while len(e):
        node = np.where(at < end, prefixes.child(node, byte[at]), -1)
        goes_on = node >= 0
        e, end, at, node = e[goes_on], end[goes_on], at[goes_on] + 1, node[goes_on]
        wanted = number[at] >= 0
        found.append((e[wanted], number[at[wanted]], node[wanted]))
    e, p, node = (
        (np.concatenate([np.zeros(0, np.int64), *column]) for column in zip(*found, strict=True)) if found else [e] * 3
    )
    kept = (prefixes.low[node] < prefixes.high[node]) | ~between[places[p]]
    return e[kept], p[kept], node[kept]


def identity_plan(tokens: TokenBytes, text: str) -> Plan:
    """The plan of a bridge between a tokenizer and itself: one state per token."""
    encoded = tokens.encode(text)
    n = len(encoded)
    chain, none = np.arange(-1, n, dtype=np.int64), np.zeros(0, dtype=np.int64)
    tree = Tree(np.append(-1, encoded.ids), chain, chain + 1, n)
    begins, previous = _begins(encoded), _previous(encoded)
    states, nowhere = np.arange(n + 1), np.zeros(n + 1, dtype=np.int64)
    return Plan(encoded.data, encoded.ids, previous, begins, tree, states[:n], states, none, nowhere, none, none)


def _pieces(byte: np.ndarray) -> np.ndarray:
    """Where pieces begin."""
    begins = (byte[1:] == 0x20) & ~np.isin(byte[:-1], WHITE)
    return np.append(0, 1 + np.flatnonzero(begins))


def first_piece(data: bytes) -> bytes:
    """`data` up to where its second piece begins."""
    found = PIECE_ENDS.search(data)
    return data[: found.start() + 1] if found else data
