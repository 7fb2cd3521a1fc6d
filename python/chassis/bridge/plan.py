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
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from chassis.bridge.canonical import CanonicalMask
from chassis.bridge.leaves import Leaves
from chassis.bridge.pretokens import FOLLOWING
from chassis.text.token_bytes import TokenBytes

PIECE_ENDS = re.compile(rb"[^ \t\r\n] ")
WHITE = frozenset(b" \t\r\n")
KEPT = 200_000  # beginnings of pieces whose encodings are kept


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


@dataclass(frozen=True, eq=False)
class Plan:
    """A text as the base's tokens, and for each of them what the expert may be doing where it begins."""

    data: bytes
    base_ids: np.ndarray  # [n] int64
    begins: np.ndarray  # [n] int64, byte at which each base token begins
    tree: Tree
    complete: tuple[tuple[int, ...], ...]  # [n] states in which the text before the base token is encoded
    under_way: tuple[tuple[tuple[int, bytes], ...], ...]  # [n] states before a token under way, and its bytes so far

    def __len__(self) -> int:
        return len(self.base_ids)

    @property
    def expert_ids(self) -> np.ndarray:
        """The expert's encoding of the text, [n_trunk]."""
        return self.tree.tokens[1 : self.tree.n_trunk + 1]


class UnderWay:
    """What a piece of text leaves open: the encodings of its beginnings, and the tokens that may be under way."""

    def __init__(self, leaves: Leaves, mask: CanonicalMask) -> None:
        self.leaves, self.mask = leaves, mask
        self._known: dict[tuple[int, bytes], tuple[np.ndarray, np.ndarray]] = {}
        self._encodings: dict[bytes, list[list[int]]] = {}
        self._lengths: list[int] = mask.tokens.lengths.tolist()

    def encodings(self, beginnings: list[bytes]) -> dict[bytes, list[list[int]]]:
        """The encodings of each beginning of a piece, as they come about before FOLLOWING."""
        if len(self._encodings) > KEPT:
            self._encodings.clear()
        missing = [data for data in dict.fromkeys(beginnings) if data not in self._encodings]
        texts = [text + after for text in map(bytes.decode, missing) for after in FOLLOWING]
        for i, ids in enumerate(self.mask.tokens.ids_of(texts)):
            data = missing[i // len(FOLLOWING)]
            found = self._encodings.setdefault(data, [])
            ends = self._ends(ids, texts[i])
            n = bisect_right(ends, len(data))
            if (n and ends[n - 1] == len(data) or not data) and ids[:n] not in found:
                found.append(ids[:n])
        return self._encodings

    def _ends(self, ids: list[int], text: str) -> list[int]:
        """Bytes [n] of the text at which its tokens end; an unknown token has none of its own, these are reported."""
        sizes = [self._lengths[index] for index in ids]
        return list(accumulate(sizes)) if all(sizes) else self.mask.tokens.encode(text).ends.tolist()

    def begins(self, begun: bytes) -> bool:
        """Whether any token begins with `begun` and goes on."""
        return len(self.leaves.under_way(begun)[0]) > 0

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


class _Grower:
    """The tree while it grows."""

    def __init__(self, expert: TokenBytes, trunk: list[list[int]]) -> None:
        self.expert = expert
        self.tokens, self.parent, self.depth = [-1], [-1], [0]
        self.children: dict[tuple[int, int], int] = {}
        self.roots = [0]
        for ids in trunk:
            self.roots.append(self.walk(self.roots[-1], ids))
        self.n_trunk = len(self.tokens) - 1

    def walk(self, node: int, path: list[int]) -> int:
        """The node at the end of `path` from `node`, made where it is missing."""
        for token in path:
            child = self.children.get((node, token))
            if child is None:
                child = self.children[node, token] = len(self.tokens)
                self.tokens.append(token)
                self.parent.append(node)
                self.depth.append(self.depth[node] + 1)
            node = child
        return node


def make_plan(expert: TokenBytes, base: TokenBytes, under_way: UnderWay, text: str) -> Plan:
    """Plan for a text that both tokenizers read as it is (see `counting.joint_text`)."""
    encoded = base.encode(text)
    data = encoded.data
    begins = np.concatenate([[0], encoded.ends[:-1]]) if len(encoded) else encoded.ends
    pieces = list(_pieces(data))
    grower = _Grower(expert, expert.ids_of([data[a:b].decode() for a, b in pieces]))
    longest = int(expert.lengths.max(initial=1))
    # The end of a piece belongs to it: that the next one begins there is not known from the text before.
    holder = np.maximum(np.searchsorted([a for a, _ in pieces], begins, side="left") - 1, 0)
    wanted = [(begins[holder == i] - a).tolist() for i, (a, _) in enumerate(pieces)]
    tokens = [_tokens_at(data[a:b], places, longest, under_way) for (a, b), places in zip(pieces, wanted, strict=True)]
    encodings = under_way.encodings([begin for found in tokens for begins_ in found for begin, _ in begins_])
    complete: list[tuple[int, ...]] = []
    open_: list[tuple[tuple[int, bytes], ...]] = []
    for root, found in zip(grower.roots, tokens, strict=False):
        for held in found:
            whole, begun = set(), []
            for begin, token in held:
                for path in encodings[begin]:
                    last = path[-1] if path else grower.tokens[root]
                    if not token:
                        whole.add(grower.walk(root, path))
                    elif len(under_way.after(last, token)[0]):
                        begun.append((grower.walk(root, path), token))
                    if token and held[0][1] and token in expert.ids_by_bytes:
                        whole.add(grower.walk(root, path + [expert.ids_by_bytes[token][0]]))
            complete.append(tuple(sorted(whole)))
            open_.append(tuple(begun))
    tree = Tree(*(np.array(x, dtype=np.int64) for x in (grower.tokens, grower.parent, grower.depth)), grower.n_trunk)
    return Plan(data, encoded.ids, begins, tree, tuple(complete), tuple(open_))


def _tokens_at(piece: bytes, places: list[int], longest: int, under_way: UnderWay) -> list[list[tuple[bytes, bytes]]]:
    """For each place p the beginnings piece[:e] behind which a token may have begun and piece[e:p], its bytes so far; e = p
    comes first, if p is between characters."""
    between = {e for e in range(len(piece) + 1) if e == len(piece) or piece[e] & 0xC0 != 0x80}
    inside = set(places) - between
    return [
        [
            (piece[:e], piece[e:p])
            for e in ([] if p in inside else [p]) + [e for e in range(max(0, p - longest), p) if e in between]
            if e == p or p in inside or under_way.begins(piece[e:p])
        ]
        for p in places
    ]


def identity_plan(tokens: TokenBytes, text: str) -> Plan:
    """The plan of a bridge between a tokenizer and itself: one state per token."""
    encoded = tokens.encode(text)
    n = len(encoded)
    chain = np.arange(-1, n, dtype=np.int64)
    tree = Tree(np.concatenate([[-1], encoded.ids]), chain, chain + 1, n)
    begins = np.concatenate([[0], encoded.ends[:-1]]) if n else encoded.ends
    return Plan(encoded.data, encoded.ids, begins, tree, tuple((i,) for i in range(n)), ((),) * n)


def _pieces(data: bytes) -> Iterator[tuple[int, int]]:
    begin = 0
    for place in range(1, len(data)):
        if data[place] == 0x20 and data[place - 1] not in WHITE:
            yield begin, place
            begin = place
    if data:
        yield begin, len(data)


def first_piece(data: bytes) -> bytes:
    """`data` up to where its second piece begins."""
    found = PIECE_ENDS.search(data)
    return data[: found.start() + 1] if found else data
