"""Where a tokenizer's pre-tokenizer splits two tokens written after each other, asked once for all tokens that look alike.

Patterns split by kind of character, so that tokens are grouped by the kinds of their characters, runs of more than three
letters shortened, and one token of each group is tried. Letters after an apostrophe, which patterns name one by one, stay.
"""

from __future__ import annotations

import unicodedata

import numpy as np

from chassis.text.token_bytes import TokenBytes

JOINED, SPLIT, BROKEN = 0, 1, 2  # one pre-token; two, between the tokens; a split inside one of the tokens
APOSTROPHES = "'’"
CONTRACTED = ("s", "t", "re", "ve", "m", "ll", "d")
FOLLOWING = ("", "\ua66e", "\u0ce9", "\ufffc")  # what may come after the two: nothing, a letter, a digit, a sign, all rare


class PreTokens:
    """`outcomes(previous)` [surroundings, V] int8: JOINED, SPLIT or BROKEN for every token after `previous`."""

    def __init__(self, tokens: TokenBytes, texts: list[str | None]) -> None:
        self.texts = texts
        self._normalizer, self._pre = tokens.plain.normalizer, tokens.plain.pre_tokenizer
        self._groups = {exact: self._group(exact) for exact in (False, True)}
        self._known: dict[tuple[str, bool], np.ndarray] = {}

    def outcomes(self, previous: int) -> np.ndarray:
        text = self.texts[previous]
        exact = any(mark in text[-3:] for mark in APOSTROPHES)
        group, members = self._groups[exact]
        key = kinds(text, exact=exact) + "".join(_before(text)), exact
        if key not in self._known:
            tried = [(before, after) for before in _before(text) for after in FOLLOWING]
            found = [[*(self._try(b, text, member, a) for member in members), JOINED] for b, a in tried]
            self._known[key] = np.array(found, dtype=np.int8)
        return self._known[key][:, group]

    def _group(self, exact: bool) -> tuple[np.ndarray, list[str]]:
        """Group number of every token (-1: not text) and a member of each group."""
        seen: dict[str, int] = {}
        members: list[str] = []
        group = np.full(len(self.texts), -1, dtype=np.int64)
        for index, text in enumerate(self.texts):
            if text is not None:
                key = (text[:3] if exact else "") + kinds(text)
                if key not in seen:
                    seen[key] = len(members)
                    members.append(text)
                group[index] = seen[key]
        return group, members

    def _try(self, before: str, left: str, right: str, after: str) -> int:
        if self._pre is None:
            return JOINED
        normal = (lambda t: t) if self._normalizer is None else self._normalizer.normalize_str
        begin, middle, end = len(normal(before)), len(normal(before + left)), len(normal(before + left + right))
        splits = self._pre.pre_tokenize_str(normal(before + left + right + after))
        begins = {place for _, (place, _) in splits if begin < place < end}
        if not begins:
            return JOINED
        return SPLIT if begins == {middle} else BROKEN


def _before(text: str) -> tuple[str, ...]:
    """What may stand before a token and change how it is split: patterns name what follows an apostrophe."""
    if text[:1] in APOSTROPHES:
        return "", "="
    return ("", "'") if text.lower() in CONTRACTED else ("",)


def kinds(text: str, exact: bool = False) -> str:
    """One character for the kind of each character; letters in runs of at most three, `exact` keeps the last three."""
    if text.isascii() and text.islower() and text.isalpha():
        return "a" * min(len(text), 3) + (text[-3:] if exact else "")
    out: list[str] = []
    near = 0  # letters that follow an apostrophe stay themselves
    for character in text:
        near = 3 if character in APOSTROPHES else near - 1
        kind = character
        if character.isalpha() or not character.isascii():
            category = unicodedata.category(character)
            kind = {"Ll": "a", "Lu": "A", "Nd": "0"}.get(category, category if character.isalpha() else character)
            if category == "Lo":
                kind = f"<{ord(character) >> 8}>"
            if near >= 0 and category[0] == "L":
                kind = character
        elif character.isdigit():
            kind = "0"
        if not (kind in ("a", "A") and out[-3:] == [kind] * 3):
            out.append(kind)
    return "".join(out) + (text[-3:] if exact else "")
