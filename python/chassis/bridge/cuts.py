"""Where the encoding of a text can be taken up, so that its beginnings need not be encoded from the start.

Patterns split a text from left to right and look ahead but a character or two, and pre-tokens are encoded each for itself.
So a text that breaks off is split as the whole text is, up to two characters before its end. Only runs of digits or of white
space may be split by what stands at their end: these are not cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chassis.text.token_bytes import TokenBytes

LOOKAHEAD = 2  # characters
WHITE, DIGIT, OTHER, PART = range(4)  # kinds of bytes; of parts of characters nothing is known
KINDS = np.array(
    [PART if b >= 0x80 else WHITE if chr(b).isspace() else DIGIT if chr(b).isdigit() else OTHER for b in range(256)]
)


def pretoken_begins(tokens: TokenBytes, texts: Sequence[str], byte: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Where pre-tokens of `texts` begin, which stand at `first` [n] in `byte`; none of texts that the tokenizer changes."""
    pre, normal = tokens.plain.pre_tokenizer, tokens.plain.normalizer
    characters, found = np.flatnonzero((byte & 0xC0) != 0x80), [np.zeros(0, dtype=np.int64)]
    for text, at in zip(texts, np.searchsorted(characters, first).tolist(), strict=True):
        if pre is not None and (normal is None or normal.normalize_str(text) == text):
            found.append(characters[[at + begin for _, (begin, _) in pre.pre_tokenize_str(text)]])
    return np.concatenate(found)


def resumed(ends: np.ndarray, own: np.ndarray, pieces: np.ndarray, sure: np.ndarray, byte: np.ndarray) -> np.ndarray:
    """Where to take up the encoding of `byte` up to each of `ends` [n], which lie in the pieces numbered `own` [n]: at the
    last of the `sure` places LOOKAHEAD characters back, or where the piece begins. All sorted."""
    characters = np.flatnonzero((byte & 0xC0) != 0x80)
    back = characters[np.maximum(np.searchsorted(characters, ends) - LOOKAHEAD, 0)]
    at = np.searchsorted(sure, back, side="right") - 1
    return np.maximum(pieces[own], np.append(sure, 0)[at])


def sure_places(byte: np.ndarray, begins: np.ndarray, token_ends: np.ndarray) -> np.ndarray:
    """Those of `begins` at which a token of the whole text ends, and not within a run of digits or white space."""
    ends = np.zeros(len(byte) + 1, dtype=bool)
    ends[token_ends] = True
    begins = begins[ends[begins]]
    after, before = KINDS[byte[begins]], KINDS[byte[begins - 1]]
    return begins[(after != PART) & (before != PART) & ((after != before) | (after == OTHER)) & (begins > 0)]
