"""Projections for the distillation loss: per student token up to K teacher tokens with weights, from the tokenizers alone.

A student token's bytes, cut by the teacher's tokenizer, give its first teacher tokens with weights 1, .1, .01, .001; the
same from the teacher's tokens is added, so that long tokens of either side are reached. Tokens of equal bytes are pinned to
one entry of weight 1, special tokens are paired by role and then by how alike they are spelled. Rows sum to 1 and keep
their K heaviest entries; everything stays sparse. Second spellings of the same bytes have empty rows.

Source: the "x-token" distillation recipe, without its dense matrix and without its scale trick, which leaves an arbitrary
teacher token in every row's last column.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from chassis.bridge.counting import encode_both
from chassis.errors import BridgeError
from chassis.text.token_bytes import TokenBytes
from chassis_kernels import SparseProjection, fit_ridge

STEPS = (1.0, 0.1, 0.01, 0.001)
SIMILAR = 0.3  # below this, two special tokens mean different things
SIMILAR_WEIGHT = 0.8
TILE = 1024  # rows of unembeddings compared at a time


@dataclass
class Entries:
    """Entries of a matrix in coordinates; equal places add up."""

    rows: np.ndarray
    columns: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, triples: Sequence[tuple[int, int, float]]) -> Entries:
        rows, columns, weights = zip(*triples, strict=True) if triples else ((), (), ())
        return cls(np.array(rows, np.int64), np.array(columns, np.int64), np.array(weights, np.float64))

    @classmethod
    def join(cls, parts: Sequence[Entries]) -> Entries:
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("rows", "columns", "weights")))

    def only(self, kept: np.ndarray) -> Entries:
        return Entries(self.rows[kept], self.columns[kept], self.weights[kept])

    def transposed(self) -> Entries:
        return Entries(self.columns, self.rows, self.weights)


def build_projection(student, teacher, *, k: int = 4) -> SparseProjection:
    """M [V_s, V_t] of at most `k` entries a row for two tokenizers of transformers, or two `TokenBytes`.

    V are the tokenizers' sizes, not their heads'. Raises TokenizerError for a tokenizer whose tokens cannot be read as
    bytes, BridgeError for k below 1.
    """
    if k < 1:
        raise BridgeError(f"k is {k}: expected at least one entry a row")
    student, teacher = (t if isinstance(t, TokenBytes) else TokenBytes.from_tokenizer(t) for t in (student, teacher))
    exact = exact_pairs(student, teacher)
    special = special_pairs(student, teacher)
    spelled = Entries.join([spellings(student, teacher), spellings(teacher, student).transposed()])
    pinned = np.zeros(student.n_tokens, dtype=bool)
    pinned[exact.rows] = True
    return _rows(Entries.join([exact, special, spelled.only(~pinned[spelled.rows])]), student.n_tokens, teacher.n_tokens, k)


def exact_pairs(student: TokenBytes, teacher: TokenBytes) -> Entries:
    """Tokens of equal bytes, weight 1: each student token with the teacher's canonical one."""
    theirs = teacher.ids_by_bytes
    return Entries.of([(i, theirs[student.bytes[i]][0], 1.0) for i in canonical(student) if student.bytes[i] in theirs])


def canonical(tokens: TokenBytes) -> list[int]:
    """Text tokens but for second spellings of the same bytes, such as a letter's byte token: no text is cut into them."""
    return sorted(ids[0] for ids in tokens.ids_by_bytes.values())


def special_pairs(student: TokenBytes, teacher: TokenBytes) -> Entries:
    """Special tokens: by role with weight 1, then greedily by spelling, 0.8 × similarity where that is 0.3 or more."""
    roles = [role for role in student.roles if role in teacher.roles]
    found = {student.roles[role]: (teacher.roles[role], 1.0) for role in reversed(roles)}
    taken = {column for column, _ in found.values()}
    mine, theirs = (
        [i for i in t.content if not t.is_text[i] and i not in used] for t, used in ((student, found), (teacher, taken))
    )
    scored = [(similarity(student.content[i], teacher.content[j]), i, j) for i in mine for j in theirs]
    for score, i, j in sorted(scored, key=lambda item: (-item[0], item[1:])):
        if score >= SIMILAR and i not in found and j not in taken:
            found[i] = (j, SIMILAR_WEIGHT * score)
            taken.add(j)
    return Entries.of([(i, j, weight) for i, (j, weight) in found.items()])


def similarity(a: str, b: str) -> float:
    """0.6 × difflib's ratio + 0.4 × the Jaccard index of the letters, in [0, 1]."""
    union = set(a) | set(b)
    jaccard = len(set(a) & set(b)) / len(union) if union else 1.0
    return 0.6 * difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() + 0.4 * jaccard


def spellings(source: TokenBytes, target: TokenBytes) -> Entries:
    """For each text token of `source` its first tokens in `target`, with weights 1, .1, .01, .001."""
    whole, parts = [], []
    for index in canonical(source):
        text = source.bytes[index].decode(errors="ignore")
        (whole if text.encode() == source.bytes[index] else parts).append(index)
    cut = target.ids_of([target.normalize(source.bytes[index].decode()) for index in whole])
    cut += [_longest_matches(source.bytes[index], target) for index in parts]
    cut = [[i for i in found if target.is_text[i]][: len(STEPS)] for found in cut]
    lengths = np.array([len(found) for found in cut], dtype=np.int64)
    rows = np.repeat(np.array(whole + parts, dtype=np.int64), lengths)
    place = np.arange(len(rows)) - np.repeat(lengths.cumsum() - lengths, lengths)
    columns = np.fromiter((i for found in cut for i in found), np.int64, len(rows))
    return Entries(rows, columns, np.array(STEPS)[place])


def _longest_matches(data: bytes, target: TokenBytes) -> list[int]:
    """Parts of characters have no text that could be encoded: the longest token that fits, again and again."""
    table, found = target.ids_by_bytes, []
    while data and len(found) < len(STEPS):
        size = next((n for n in range(len(data), 0, -1) if data[:n] in table), 0)
        if not size:
            break
        found.append(table[data[:size]][0])
        data = data[size:]
    return found


def _rows(entries: Entries, n_student: int, n_teacher: int, k: int) -> SparseProjection:
    """Equal places added up, rows normalised, heaviest first, cut to k and normalised again."""
    place, inverse = np.unique(entries.rows * n_teacher + entries.columns, return_inverse=True)
    weights = np.bincount(inverse, weights=entries.weights, minlength=len(place))
    rows, columns = place // n_teacher, place % n_teacher
    order = np.lexsort((columns, -weights, rows))
    rows, columns, weights = rows[order], columns[order], weights[order]
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    kept = (rank < k) & (weights > 0)
    rows, columns, weights, rank = rows[kept], columns[kept], weights[kept], rank[kept]
    total = np.bincount(rows, weights=weights, minlength=n_student)
    indices, values = np.full((n_student, k), -1, dtype=np.int64), np.zeros((n_student, k), dtype=np.float32)
    indices[rows, rank], values[rows, rank] = columns, weights / total[rows]
    return SparseProjection(torch.from_numpy(indices), torch.from_numpy(values), n_teacher)


def counted_projection(student, teacher, texts: Iterable[str], *, k: int = 8, prior: float = 1.0) -> SparseProjection:
    """Rows estimated on text: where a token of each begins at the same byte, how often the teacher's is t if the student's
    is s. The rows of `build_projection` count as `prior` occurrences, so that no token is left out.

    Unlike rows from the tokenizers alone they reach every teacher token that begins where a student token does: an exact
    pair is pinned only as far as the text bears it out. Raises BridgeError where nothing was counted, and for a text that
    the two normalizers never agree on.
    """
    student, teacher = (t if isinstance(t, TokenBytes) else TokenBytes.from_tokenizer(t) for t in (student, teacher))
    base = build_projection(student, teacher, k=k)
    stored = base.indices >= 0
    parts = [
        Entries(stored.nonzero()[:, 0].numpy(), base.indices[stored].numpy(), prior * base.weights[stored].double().numpy())
    ]
    for a, b in encode_both(student, teacher, (text for text in texts if text)):
        starts = np.intersect1d(np.append(0, a.ends[:-1]), np.append(0, b.ends[:-1]))
        rows, columns = (e.ids[np.searchsorted(e.ends, starts, side="right")] for e in (a, b))
        parts.append(Entries(rows, columns, np.ones(len(starts))))
    if not any(len(part.rows) for part in parts[1:]):
        raise BridgeError("no text to count on: give texts, or build the projection from the two tokenizers alone")
    return _rows(Entries.join(parts), student.n_tokens, teacher.n_tokens, k)


@torch.no_grad()
def embedding_projection(
    student: TokenBytes, teacher: TokenBytes, student_rows: torch.Tensor, teacher_rows: torch.Tensor, *, k: int = 4
) -> SparseProjection:
    """Rows by likeness of embeddings: the student's [V_s, D_s] are mapped into the teacher's space [V_t, D_t] by least
    squares on tokens of equal bytes, and each row keeps the `k` teacher tokens of the highest positive cosine.

    Byte-equal tokens and special tokens are paired as in `build_projection`. Raises BridgeError when too few tokens are
    equal to fit the map.
    """
    exact, special = exact_pairs(student, teacher), special_pairs(student, teacher)
    width = student_rows.shape[1]
    if len(exact.rows) < 2 * width:
        raise BridgeError(f"{len(exact.rows)} tokens of equal bytes to fit a map of width {width}: expected {2 * width}")
    a, b = student_rows.float(), teacher_rows.float()[: teacher.n_tokens]
    W, bias = fit_ridge(a[torch.from_numpy(exact.rows)], b[torch.from_numpy(exact.columns)], 1e-3, alpha_scale="trace")
    centre = b.mean(0)
    b = torch.nn.functional.normalize(b - centre, dim=1)
    b[torch.from_numpy(~teacher.is_text[: teacher.n_tokens])] = 0
    parts, pinned = [exact, special], set(exact.rows.tolist())
    free = np.array([i for i in canonical(student) if i not in pinned], dtype=np.int64)
    for start in range(0, len(free), TILE):
        ids = free[start : start + TILE]
        mapped = torch.nn.functional.normalize(a[torch.from_numpy(ids)] @ W + bias - centre, dim=1)
        score, column = (mapped @ b.T).topk(min(k, len(b)), dim=1)
        weight = score.clamp_min(0).flatten().double().numpy()
        parts.append(Entries(ids.repeat(score.shape[1]), column.flatten().numpy(), weight))
    return _rows(Entries.join(parts), student.n_tokens, teacher.n_tokens, k)
