"""Which states of the expert a text needs, so that every base position is read from the text before it alone.

Whether the expert's encoding of a whole text has a token end at some byte depends on the text behind it. So at each base
position p all is kept that the text up to p leaves open: the encodings that end at p, whatever follows first (`FOLLOWING`),
and for each byte e before p the encodings that end at e, from which a token may be under way that begins with the bytes
e..p. Of these tokens only those count that can follow the last token of the encoding (`CanonicalMask`), mostly none.

The encodings form a tree: a trunk, which encodes the whole text, with short branches. They are made piece by piece, a piece
beginning at each space that follows something else; there, no tokenizer in use joins tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from chassis.bridge.canonical import CanonicalMask
from chassis.bridge.leaves import Leaves
from chassis.bridge.pretokens import FOLLOWING
from chassis.text.token_bytes import TokenBytes

WHITE = frozenset(b" \t\r\n")


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
    """`after(last, begun)`: the tokens that can follow token `last`, begin with `begun` and go on; their residuals' rows."""

    def __init__(self, leaves: Leaves, mask: CanonicalMask) -> None:
        self.leaves, self.mask = leaves, mask
        self._known: dict[tuple[int, bytes], tuple[np.ndarray, np.ndarray]] = {}

    def after(self, last: int, begun: bytes) -> tuple[np.ndarray, np.ndarray]:
        key = last, begun
        if key not in self._known:
            tokens, rows = self.leaves.under_way(begun)
            if last >= 0 and len(tokens):
                kept = ~self.mask.rows([last])[0][tokens]
                tokens, rows = tokens[kept], rows[kept]
            self._known[key] = tokens, rows
        return self._known[key]


class _Grower:
    """The tree while it grows, and the encodings of one piece up to each byte."""

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

    def encodings(self, piece: bytes, places: list[int]) -> dict[int, list[list[int]]]:
        """Encodings of piece[:place] for the places that lie between characters, as they come about before FOLLOWING."""
        places = [place for place in places if place == len(piece) or piece[place] & 0xC0 != 0x80]
        found: dict[int, list[list[int]]] = {place: [] for place in places}
        texts = [piece[:place].decode() + after for place in places for after in FOLLOWING]
        for i, ids in enumerate(self.expert.ids_of(texts)):
            place = places[i // len(FOLLOWING)]
            ends = self._ends(ids, texts[i])
            n = int(np.searchsorted(ends, place, side="right"))
            if (n and ends[n - 1] == place or place == 0) and ids[:n] not in found[place]:
                found[place].append(ids[:n])
        return found

    def _ends(self, ids: list[int], text: str) -> np.ndarray:
        """Bytes [n] of the text at which its tokens end; an unknown token has none of its own, these are reported."""
        known = self.expert.is_text[ids].all()
        return np.cumsum(self.expert.lengths[ids]) if known else self.expert.encode(text).ends


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
    complete: list[tuple[int, ...]] = []
    open_: list[tuple[tuple[int, bytes], ...]] = []
    for i, (a, b) in enumerate(pieces):
        wanted = (begins[holder == i] - a).tolist()
        if not wanted:
            continue
        piece, root = data[a:b], grower.roots[i]
        near = sorted({e for p in wanted for e in range(max(0, p - longest), p + 1)})
        encodings = grower.encodings(piece, near)
        for p in wanted:
            whole = {grower.walk(root, path) for path in encodings.get(p, [])}
            begun = []
            for e in (e for e in range(max(0, p - longest), p) if e in encodings):
                for path in encodings[e]:
                    last = path[-1] if path else grower.tokens[root]
                    if len(under_way.after(last, piece[e:p])[0]):
                        begun.append((grower.walk(root, path), piece[e:p]))
                    if p not in encodings and piece[e:p] in expert.ids_by_bytes:
                        whole.add(grower.walk(root, path + [expert.ids_by_bytes[piece[e:p]][0]]))
            complete.append(tuple(sorted(whole)))
            open_.append(tuple(begun))
    tree = Tree(*(np.array(x, dtype=np.int64) for x in (grower.tokens, grower.parent, grower.depth)), grower.n_trunk)
    return Plan(data, encoded.ids, begins, tree, tuple(complete), tuple(open_))


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
