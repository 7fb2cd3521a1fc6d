"""Alignment of token strings, where all that is left of a tokenization is its pieces: no text, no offsets.

Pieces are brought to bytes (GPT-2's byte alphabet, "▁", "<0xNN>"). Where both sides spell the same bytes, their ends give
the chunks. Where they do not (unknown tokens, other normalisers), a longest common subsequence of the bytes places both on
one line: tokens end together where the path of the subsequence passes through both their ends. Time and memory grow with
the product of the lengths of what differs, after what the two have in common at either end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chassis.errors import ChassisError
from chassis.text.alignment import Alignment, align
from chassis.text.spans import Spans
from chassis.text.tokenizer_json import BYTE_OF, BYTE_PIECE

MAX_CELLS = 1 << 28


def piece_bytes(pieces: Sequence[str]) -> list[bytes]:
    """The bytes of each piece, in the spelling the whole sequence uses.

    Pieces that hold no letter outside GPT-2's alphabet, and one of its stand-ins for a byte that does not print, are read
    by that alphabet; others as text in which ▁ is a space and <0xNN> a byte.
    """
    letters = set("".join(pieces))
    if letters <= set(BYTE_OF) and any(ord(letter) >= 256 for letter in letters):
        return [bytes(BYTE_OF[letter] for letter in piece) for piece in pieces]
    found = []
    for piece in pieces:
        byte = BYTE_PIECE.fullmatch(piece)
        found.append(bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode())
    return found


def align_tokens(student: Sequence[str], teacher: Sequence[str]) -> Alignment:
    """Align one pair of token strings; the batch is 1. Raises ChassisError where the pieces differ over too long
    a stretch.
    """
    pieces = piece_bytes(student), piece_bytes(teacher)
    texts = [b"".join(p) for p in pieces]
    lengths = [np.array([len(piece) for piece in p], dtype=np.int64) for p in pieces]
    ends = [np.cumsum(length) for length in lengths]
    if texts[0] == texts[1]:
        return align(*(_spans(e, n, texts[0]) for e, n in zip(ends, lengths, strict=True)))
    places = _common_line(*texts)
    line = b"x" * int(places[0][-1])
    return _same_bytes(align(*(_spans(p[e], n, line) for p, e, n in zip(places, ends, lengths, strict=True))), pieces)


def _spans(end: np.ndarray, length: np.ndarray, text: bytes) -> Spans:
    end = end[None]
    start = np.concatenate([np.zeros_like(end[:, :1]), end[:, :-1]], 1)
    no = np.zeros(end.shape, dtype=bool)
    return Spans(np.zeros_like(end), ~no, start, end, no.astype(np.int8), no, (text,))


def _same_bytes(found: Alignment, pieces: tuple[list[bytes], list[bytes]]) -> Alignment:
    """Chunks of a common line are correct where the bytes of both sides are the same."""
    ids = [found.student_chunk_id[0].tolist(), found.teacher_chunk_id[0].tolist()]
    n = found.pair_valid.shape[1]
    spelled = [[b"".join(p for p, i in zip(side, own, strict=True) if i == chunk) for chunk in range(n)]
               for side, own in zip(pieces, ids, strict=True)]  # fmt: skip
    correct = found.pair_valid.clone()
    for chunk in range(n):
        correct[0, chunk] &= spelled[0][chunk] == spelled[1][chunk]
    single = [c for c in range(n) if correct[0, c] and ids[0].count(c) == ids[1].count(c) == 1]
    exact = [own.new_tensor([[i in single for i in own[0].tolist()]]).bool() for own in found[:2]]
    return found._replace(
        pair_is_correct=correct, student_exact_partition_mask=exact[0], teacher_exact_partition_mask=exact[1]
    )


def _common_line(a: bytes, b: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Place on one line of each byte boundary of a and b, equal where a longest common subsequence passes both."""
    x, y = np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)
    shorter = min(len(x), len(y))
    differ = np.flatnonzero(x[:shorter] != y[:shorter])
    head = int(differ[0]) if len(differ) else shorter
    differ = np.flatnonzero(x[::-1][: shorter - head] != y[::-1][: shorter - head])
    tail = int(differ[0]) if len(differ) else shorter - head
    n, m = len(x) - head - tail, len(y) - head - tail
    if n * m > MAX_CELLS:
        raise ChassisError(f"the pieces differ over {n} and {m} bytes: expected the same text on both sides")
    moves = _path(x[head : head + n], y[head : head + m])
    moves = np.concatenate([np.full(head, 3), moves, np.full(tail, 3)]).astype(np.int64)
    position = np.arange(1, len(moves) + 1)
    place = []
    for bit, length in ((1, len(x)), (2, len(y))):
        consumed = np.concatenate([[0], np.cumsum(moves & bit > 0)])
        last = np.zeros(length + 1, dtype=np.int64)
        last[consumed] = np.concatenate([[0], position])  # the last point of the path with that many bytes consumed
        place.append(last)
    return place[0], place[1]


def _path(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Moves of a longest common subsequence: 1 consumes a byte of x, 2 one of y, 3 a common byte of both."""
    n, m = len(x), len(y)
    best = np.zeros((n + 1, m + 1), dtype=np.int32)
    for i in range(1, n + 1):
        step = np.maximum(best[i - 1, 1:], best[i - 1, :-1] + (y == x[i - 1]))
        best[i, 1:] = np.maximum.accumulate(step)
    moves, i, j = [], n, m
    while i or j:
        if i and j and x[i - 1] == y[j - 1] and best[i, j] == best[i - 1, j - 1] + 1:
            moves.append(3)
            i, j = i - 1, j - 1
        elif i and best[i, j] == best[i - 1, j]:
            moves.append(1)
            i -= 1
        else:
            moves.append(2)
            j -= 1
    return np.array(moves[::-1], dtype=np.int64)
