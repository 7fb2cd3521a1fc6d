"""Where a tokenizer's pre-tokenizer splits two tokens written after each other, asked once for all tokens that look alike.

Patterns split by kind of character, so that tokens are grouped by the kinds of their characters, runs of more than three
letters shortened, and one token of each group is tried. Letters after an apostrophe, which patterns name one by one, stay.

What comes before matters less: a pattern knows a dozen states in which a token may end, which the outcomes of a few short
tokens behind it tell apart. All groups are tried behind one token of each state.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from chassis.text.token_bytes import TokenBytes

JOINED, SPLIT, BROKEN = 0, 1, 2  # one pre-token; two, between the tokens; a split inside one of the tokens
APOSTROPHES = "'’"
CONTRACTED = ("s", "t", "re", "ve", "m", "ll", "d")
LEFTS = 64
SHORT = re.compile(r"[a-zA-Z0-9\s]*", re.ASCII)
HEAD = re.compile(r"[a-zA-ZÀ-ɏ]{0,3}")
RUNS = re.compile(r"(a|A)\1{3,}")
FOLLOWING = ("", "\ua66e", "\u0ce9", "\ufffc")  # what may come after the two: nothing, a letter, a digit, a sign, all rare


class Splits(NamedTuple):
    """What `PreTokens` tells of all tokens."""

    context: np.ndarray  # [V] int32, the state that a token leaves behind it
    split: np.ndarray  # [states, V] bool
    joined: np.ndarray  # [states, V] bool

    def after(self, previous: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `PreTokens.after`, for several tokens [n]: both [n, V]."""
        state = self.context[previous]
        return self.split[state], self.joined[state]

    def pack(self) -> dict[str, np.ndarray]:
        """Arrays to be saved."""
        return {"context": self.context, "split": np.packbits(self.split, 1), "joined": np.packbits(self.joined, 1)}

    @classmethod
    def unpack(cls, packed: Mapping[str, np.ndarray]) -> Splits:
        """From what `pack` gave."""
        context = packed["context"]
        bits = (np.unpackbits(packed[name], axis=1, count=len(context)).view(bool) for name in ("split", "joined"))
        return cls(context, *bits)


class PreTokens:
    """`after(previous)`: how every token may be split from `previous`, whatever stands around the two."""

    def __init__(self, tokens: TokenBytes, texts: list[str | None]) -> None:
        self.texts = texts
        self._normalizer, self._pre = tokens.plain.normalizer, tokens.plain.pre_tokenizer
        self._whole = np.array([text is not None for text in texts])
        self._known = [text for text in texts if text is not None]
        self._group, self._members = _grouped(map(kinds, self._known), self._known)
        self._kinds: dict[tuple[str, bool], tuple[np.ndarray, np.ndarray]] = {}
        self._classes: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def after(self, previous: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [V] bool that the pre-tokenizer, in some surroundings, splits off `previous`, and that it leaves joined."""
        text = self.texts[previous]
        exact = any(mark in text[-3:] for mark in APOSTROPHES)
        key = kinds(text, exact=exact) + "".join(_before(text)), exact
        if key not in self._kinds:
            probes = [*self._probes, *self._contracted] if exact else self._probes
            seen = self._outcomes(text, probes).tobytes() + bytes([exact])
            if seen not in self._classes:
                self._classes[seen] = self._all_outcomes(text, exact)
            self._kinds[key] = self._classes[seen]
        return self._kinds[key]

    def splits(self) -> Splits:
        """`after` of every token; tokens without text of their own are in state 0."""
        context, states, found = np.zeros(len(self.texts), dtype=np.int32), {}, []
        for previous in np.flatnonzero(self._whole).tolist():
            pair = self.after(previous)
            context[previous] = states.setdefault(id(pair), len(states))
            if len(states) > len(found):
                found.append(pair)
        split, joined = np.array(found, dtype=bool).reshape(-1, 2, len(self.texts)).transpose(1, 0, 2)
        return Splits(context, split, joined)

    @cached_property
    def _probes(self) -> list[str]:
        """What tells apart the tokens before it: single characters, and up to three letters, digits and spaces of ASCII; of
        those that behave alike behind each other, the ASCII ones and LEFTS of the rest, one."""
        short = [m for m in self._members if len(m) == 1 or len(m) <= 3 and SHORT.fullmatch(m)]
        lefts = [m for m in short if m.isascii()] + [m for m in short if not m.isascii()][:LEFTS]
        return self._unlike(short, lefts)

    @cached_property
    def _contracted(self) -> list[str]:
        """What else tells apart tokens with an apostrophe: one or two letters, of those that behave alike one."""
        lefts = [t for t in dict.fromkeys([*APOSTROPHES, *self._known]) if len(t) <= 2 and any(m in t for m in APOSTROPHES)]
        return self._unlike([head for head in self._heads[1] if len(head) <= 2], lefts[:LEFTS])

    def _unlike(self, rights: list[str], lefts: list[str]) -> list[str]:
        """One of all `rights` that are split in the same way behind each of `lefts`."""
        if not rights:
            return []
        behave = np.array([self._outcomes(left, rights)[: len(FOLLOWING)] for left in lefts])
        _, first = np.unique(behave.reshape(-1, len(rights)), axis=1, return_index=True)
        return [rights[i] for i in np.sort(first).tolist()]

    @cached_property
    def _heads(self) -> tuple[np.ndarray, list[str]]:
        """The letters, three at most, that a token begins with: the number of each token's, and all there are."""
        heads = [HEAD.match(text)[0] for text in self._known]
        return _grouped(heads, heads)

    def _all_outcomes(self, left: str, exact: bool) -> tuple[np.ndarray, np.ndarray]:
        group, members = self._group, self._members
        if exact:  # behind an apostrophe it matters with which letters a token begins
            head, heads = self._heads
            after_letters = self._outcomes(left, heads, FOLLOWING[:2]).T[head]
            group, members = _grouped(zip(group.tolist(), map(bytes, after_letters), strict=True), self._known)
        found = self._outcomes(left, members)
        split, joined = np.zeros((2, len(self.texts)), dtype=bool)
        split[self._whole], joined[self._whole] = (found == SPLIT).any(0)[group], (found == JOINED).any(0)[group]
        return split, joined

    def _outcomes(self, left: str, rights: list[str], following: Sequence[str] = FOLLOWING) -> np.ndarray:
        """JOINED, SPLIT or BROKEN [surroundings, rights] int8."""
        befores = _before(left)
        if self._pre is None:
            return np.full((len(befores) * len(following), len(rights)), JOINED, dtype=np.int8)
        normal = (lambda t: t) if self._normalizer is None else self._normalizer.normalize_str
        found = []
        for before in befores:
            begin, middle = len(normal(before)), len(normal(before + left))
            ends = [len(normal(before + left + right)) for right in rights]
            for after in following:
                for right, end in zip(rights, ends, strict=True):
                    splits = self._pre.pre_tokenize_str(normal(before + left + right + after))
                    begins = [place for _, (place, _) in splits if begin < place < end]
                    found.append(JOINED if not begins else SPLIT if begins == [middle] else BROKEN)
        return np.array(found, dtype=np.int8).reshape(-1, len(rights))


def _grouped(keys: Iterable[Hashable], texts: list[str]) -> tuple[np.ndarray, list[str]]:
    """The group [n] of each text, by its key, and the first text of each group."""
    first: dict[Hashable, int] = {}
    members: list[str] = []
    group = np.empty(len(texts), dtype=np.int64)
    for place, (key, text) in enumerate(zip(keys, texts, strict=True)):
        number = first.setdefault(key, len(members))
        if number == len(members):
            members.append(text)
        group[place] = number
    return group, members


def _before(text: str) -> tuple[str, ...]:
    """What may stand before a token and change how it is split: patterns name what follows an apostrophe."""
    if text[:1] in APOSTROPHES:
        return "", "="
    return ("", "'") if text.lower() in CONTRACTED else ("",)


def kinds(text: str, exact: bool = False) -> str:
    """One character for the kind of each character; letters in runs of at most three, `exact` keeps the last three."""
    near = -1  # letters that follow an apostrophe stay themselves
    if not any(mark in text for mark in APOSTROPHES):
        found = "".join(map(_kind, text))
    else:
        found = ""
        for character in text:
            near = 3 if character in APOSTROPHES else near - 1
            found += character if near >= 0 and character.isalpha() else _kind(character)
    return RUNS.sub(r"\1\1\1", found) + (text[-3:] if exact else "")


@lru_cache(None)
def _kind(character: str) -> str:
    if character.isascii() and not character.isalnum():
        return character
    category = unicodedata.category(character)
    if category == "Lo":
        return f"<{ord(character) >> 8}>"
    return {"Ll": "a", "Lu": "A", "Nd": "0"}.get(category, category if character.isalpha() else character)
