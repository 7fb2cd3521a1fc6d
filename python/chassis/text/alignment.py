"""Which tokens of two tokenizations cover the same text.

A token of text ends at a byte. Where a token of the student and one of the teacher end at the same byte, a *chunk* closes;
a token belongs to the first chunk that closes at or after its end. So every chunk is as short as the two tokenizations
allow, byte-fallback pieces (which share the span of their character) fall into one chunk, and the whole batch is a sorted
intersection: O(n log n), no search. Special tokens pair by role and place, each pair a chunk of its own; one without a
partner keeps a chunk that is not valid. The text after the last shared end (one side was cut) is a last chunk, not valid.

Every place in a batch has one number, its key: (sample, byte, role), role 0 being text that ends at that byte.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from chassis.errors import ChassisError
from chassis.text.spans import ROLES, Spans
from chassis_kernels import Chunks

KINDS = len(ROLES) + 2  # keys of one byte: text, then the special tokens that stand there, then the rest of a sample
REST = KINDS - 1
_SOLID = np.array([byte not in b" \t\n\r\x0b\x0c" for byte in range(256)])


class Alignment(NamedTuple):
    """Chunk ids are label-space: position t carries the chunk of the token at t, -1 for none. C: the most in a sample."""

    student_chunk_id: torch.Tensor  # [B, T_s] int64
    teacher_chunk_id: torch.Tensor  # [B, T_t] int64
    pair_valid: torch.Tensor  # [B, C] bool: both sides have a token, and they end together
    pair_is_correct: torch.Tensor  # [B, C] bool: valid, and both spell the same bytes
    student_exact_partition_mask: torch.Tensor  # [B, T_s] bool: one token on either side, spelling the same
    teacher_exact_partition_mask: torch.Tensor  # [B, T_t] bool
    num_chunks: torch.Tensor  # [B] int64

    @property
    def chunks(self) -> Chunks:
        """What the losses take."""
        return Chunks(self.student_chunk_id, self.teacher_chunk_id, self.pair_valid, self.pair_is_correct)


def align(student: Spans, teacher: Spans) -> Alignment:
    """Align two tokenizations of the same texts. Raises ChassisError when the texts differ.

    A chunk is correct when on either side its tokens cover all of its bytes but white space (some tokenizers leave it
    out of their offsets), none of them the unknown token. About 0.4 ms for two tokenizations of 2048 tokens.
    """
    _check(student, teacher)
    stride = KINDS * (max((len(text) for text in student.texts), default=0) + 2)
    keys = [np.arange(len(side.end))[:, None] * stride + side.end * KINDS + side.role for side in (student, teacher)]
    inside = [side.end >= 0 for side in (student, teacher)]
    slots = _slots(keys, inside, stride)
    is_text = slots % KINDS == 0
    places = [_place(k, slots) for k in keys]
    counts = [np.bincount(place[i], minlength=len(slots)) for place, i in zip(places, inside, strict=True)]
    valid = (counts[0] > 0) & (counts[1] > 0) & (slots % KINDS != REST)
    spelled = [_spelled(side, p, slots, stride) for side, p in zip((student, teacher), places, strict=True)]
    correct = valid & (~is_text | (spelled[0] & spelled[1]))
    single = correct & (counts[0] == 1) & (counts[1] == 1)

    first = np.searchsorted(slots, np.arange(len(student.texts) + 1) * stride)
    n_chunks = np.diff(first)
    sample = np.repeat(np.arange(len(n_chunks)), n_chunks)
    tables = np.zeros((2, len(n_chunks), int(n_chunks.max(initial=0))), dtype=bool)
    tables[:, sample, np.arange(len(slots)) - first[sample]] = valid, correct
    ids = [np.where(i, place - first[:-1, None], -1) for place, i in zip(places, inside, strict=True)]
    exact = [i & np.append(single, False)[np.where(i, place, -1)] for place, i in zip(places, inside, strict=True)]
    return Alignment(*(torch.from_numpy(array) for array in (*ids, *tables, *exact, n_chunks)))


def _check(student: Spans, teacher: Spans) -> None:
    if len(student.texts) != len(teacher.texts):
        raise ChassisError(f"{len(student.texts)} texts on the student's side and {len(teacher.texts)} on the teacher's")
    for row, (a, b) in enumerate(zip(student.texts, teacher.texts, strict=True)):
        if a != b:
            raise ChassisError(f"sample {row}: the student's text ({len(a)} bytes) is not the teacher's ({len(b)} bytes)")


def _slots(keys: list[np.ndarray], inside: list[np.ndarray], stride: int) -> np.ndarray:
    """Keys of the batch's chunks, sorted: shared ends of text, special tokens, and one for a sample's rest."""
    used = [k[i] for k, i in zip(keys, inside, strict=True)]
    text = [_distinct(k[k % KINDS == 0]) for k in used]
    both = np.sort(np.concatenate(text), kind="stable")
    shared = both[:-1][both[1:] == both[:-1]]
    shared = shared[shared % stride > 0]  # a chunk holds at least a byte
    n_samples = len(keys[0])
    last = np.zeros(n_samples, dtype=np.int64)
    np.maximum.at(last, shared // stride, shared % stride)
    behind = np.concatenate([k[k % stride > last[k // stride]] for k in text])
    rest = _distinct(behind // stride) * stride + stride - 1
    return _distinct(np.concatenate([shared, *(k[k % KINDS > 0] for k in used), rest]))


def _distinct(keys: np.ndarray) -> np.ndarray:
    """The distinct keys in order; quicker than np.unique on runs that are sorted already, as tokens are."""
    keys = np.sort(keys, kind="stable")
    return keys[np.diff(keys, prepend=-1) > 0]


def _place(keys: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Which slot each token belongs to: a special token's own, else the first slot of text at or after its end."""
    text = np.flatnonzero((slots % KINDS == 0) | (slots % KINDS == REST))
    if not len(text):
        return np.searchsorted(slots, keys)
    following = text[np.minimum(np.searchsorted(slots[text], keys), len(text) - 1)]
    return np.where(keys % KINDS == 0, following, np.searchsorted(slots, keys))


def _spelled(side: Spans, place: np.ndarray, slots: np.ndarray, stride: int) -> np.ndarray:
    """[slots] bool: the side's tokens of text cover every byte of the slot's text but white space, and are all known."""
    text = np.frombuffer(b"".join(side.texts), np.uint8)
    solid = np.concatenate([[0], np.cumsum(_SOLID[text])])  # bytes that count before each byte of the batch
    base = np.cumsum([0, *map(len, side.texts)])
    chosen = (side.end >= 0) & (side.role == 0)
    offset = np.broadcast_to(base[:-1, None], side.end.shape)[chosen]
    start, end = side.start[chosen] + offset, side.end[chosen] + offset
    before = np.maximum.accumulate(np.concatenate([[0], end]))[:-1]  # pieces of one character count once
    amount = np.maximum(solid[end] - solid[np.clip(start, before, end)], 0)
    covered = np.bincount(place[chosen], weights=amount, minlength=len(slots)).astype(np.int64)
    known = np.bincount(place[chosen], weights=side.unknown[chosen], minlength=len(slots)) == 0
    # A slot's text runs from the slot of text before it to its own end.
    ends = slots % KINDS == 0
    reach = solid[base[slots[ends] // stride] + slots[ends] % stride // KINDS]
    needed = np.diff(reach, prepend=0)
    opens = np.diff(slots[ends] // stride, prepend=-1) > 0
    needed[opens] = reach[opens] - solid[base[slots[ends][opens] // stride]]
    full = np.zeros(len(slots), dtype=bool)
    full[ends] = covered[ends] == needed
    return full & known
