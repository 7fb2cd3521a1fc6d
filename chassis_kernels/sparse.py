"""SparseProjection: per student token a few teacher tokens with weights, and the same entries by teacher token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

RELAXED_WEIGHT = 0.6


class ColumnView(NamedTuple):
    """The entries of a projection by teacher token: column t is `rows[start[t]:start[t + 1]]`, ascending."""

    start: Tensor  # [V_t + 1] int64
    rows: Tensor  # [nnz] int32, student ids
    weights: Tensor  # [nnz] float32 or float64


class ProjectionView(NamedTuple):
    """As much of a SparseProjection as the losses read, for instance of the columns that they compare."""

    columns: ColumnView
    n_student: int

    @property
    def n_teacher(self) -> int:
        return len(self.columns.start) - 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.n_student, self.n_teacher


class Edges(NamedTuple):
    """Entries of a projection within a column set J, by (row, position in J)."""

    rows: Tensor  # [E] int64, student ids
    positions: Tensor  # [E] int64, places in J
    weights: Tensor  # [E]


class ProjectionReport(NamedTuple):
    """Counts that tell a sound projection from a broken one."""

    rows: int
    entries: int
    empty_rows: int
    empty_columns: int
    duplicates: int  # entries whose id is already in the row; they add up
    zero_weights: int
    row_sum_min: float  # over the rows that have entries
    row_sum_max: float
    last_column_share: float  # share of the commonest id in the last stored column: near 1 where a file is padded with it


@dataclass(frozen=True, eq=False)
class SparseProjection:
    """M [V_s, V_t] as rows of at most K entries.

    indices [V_s, K] int (-1: empty), weights [V_s, K] float >= 0 on the same device. Equal ids in a row add up. Raises
    ValueError, with counts, for ids outside [-1, n_teacher) and for weights that are NaN, infinite or negative.
    """

    indices: Tensor
    weights: Tensor
    n_teacher: int
    columns: ColumnView = field(init=False, repr=False)  # the entries by teacher token, without those of weight 0
    _maps: dict[bool, tuple[Tensor, Tensor]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        indices, weights = self.indices, self.weights
        if indices.dim() != 2 or weights.shape != indices.shape:
            raise ValueError(
                f"indices [V_s, K] and weights of that shape are wanted: got {tuple(indices.shape)}, {tuple(weights.shape)}"
            )
        if indices.is_floating_point() or not weights.is_floating_point():
            raise ValueError(f"indices must be integers and weights floats: got {indices.dtype} and {weights.dtype}")
        stored = indices >= 0
        outside = int(((indices < -1) | (indices >= self.n_teacher)).sum())
        if outside:
            raise ValueError(
                f"{outside} of {indices.numel()} ids are outside -1..{self.n_teacher - 1}: from {int(indices.min())} to "
                f"{int(indices.max())}, with {self.n_teacher} teacher tokens"
            )
        not_finite = int((stored & ~weights.isfinite()).sum())
        negative = int((stored & (weights < 0)).sum())
        if not_finite or negative:
            raise ValueError(f"of {int(stored.sum())} weights {not_finite} are NaN or infinite and {negative} negative")
        object.__setattr__(self, "indices", indices.to(torch.int64))
        weights = weights if weights.dtype == torch.float64 else weights.float()
        object.__setattr__(self, "weights", torch.where(stored, weights, 0.0))
        # Made here and not where they are first wanted: a compiled graph cannot make them.
        object.__setattr__(self, "columns", self._by_column())
        object.__setattr__(self, "_maps", {relaxed: self._map(relaxed) for relaxed in (False, True)})

    @property
    def n_student(self) -> int:
        return self.indices.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.n_student, self.n_teacher

    def _by_column(self) -> ColumnView:
        stored = (self.indices >= 0) & (self.weights > 0)
        ids = self.indices[stored]
        rows = stored.nonzero()[:, 0]
        order = torch.argsort(ids, stable=True)
        start = torch.zeros(self.n_teacher + 1, dtype=torch.int64, device=ids.device)
        start[1:] = torch.bincount(ids, minlength=self.n_teacher).cumsum(0)
        return ColumnView(start, rows[order].to(torch.int32), self.weights[stored][order])

    def slice(self, columns: Tensor) -> Edges:
        """The entries in the teacher tokens `columns` [k] (any order, repeats allowed), in time O(k + entries found)."""
        return slice_columns(*self.columns, columns)

    def dense(self) -> Tensor:
        """M itself, [V_s, V_t]: for small tests."""
        matrix = self.weights.new_zeros(self.n_student, self.n_teacher + 1)
        return matrix.scatter_add(1, torch.where(self.indices < 0, self.n_teacher, self.indices), self.weights)[:, :-1]

    def exact_map(self, *, relaxed: bool = False) -> tuple[Tensor, Tensor]:
        """One-to-one pairs (student ids [n], teacher ids [n]) of tokens that count as equal, by ascending teacher id.

        A row's pair is its heaviest entry: strict, of weight exactly 1 with nothing stored second; relaxed, of weight at
        least 0.6. Where several rows claim a teacher token the lowest student id gets it; relaxed, the heaviest first.
        """
        return self._maps[relaxed]

    def _map(self, relaxed: bool) -> tuple[Tensor, Tensor]:
        if self.indices.numel() == 0:
            return self.indices.new_empty(0), self.indices.new_empty(0)
        weight, place = torch.where(self.indices >= 0, self.weights, -1.0).max(1)
        target = self.indices.gather(1, place[:, None])[:, 0]
        if relaxed:
            claims = weight >= RELAXED_WEIGHT
        else:
            claims = weight == 1.0
            if self.indices.shape[1] > 1:
                claims &= self.indices[:, 1] == -1
        students = claims.nonzero()[:, 0]
        if relaxed:
            students = students[torch.argsort(weight[students], descending=True, stable=True)]
        students = students[torch.argsort(target[students], stable=True)]
        teachers = target[students]
        first = torch.ones_like(teachers, dtype=torch.bool)
        first[1:] = teachers[1:] != teachers[:-1]
        return students[first], teachers[first]

    def report(self) -> ProjectionReport:
        """Counts over all entries; one pass, no change."""
        stored = self.indices >= 0
        ordered = self.indices.sort(1).values
        duplicates = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        filled = stored.any(1)
        sums = self.weights.sum(1)[filled]
        last = self.indices[:, -1][stored[:, -1]] if self.indices.shape[1] else self.indices.new_empty(0)
        return ProjectionReport(
            rows=self.n_student,
            entries=int(stored.sum()),
            empty_rows=int((~filled).sum()),
            empty_columns=int((self.columns.start.diff() == 0).sum()),
            duplicates=int(duplicates.sum()),
            zero_weights=int((stored & (self.weights == 0)).sum()),
            row_sum_min=float(sums.min()) if len(sums) else 0.0,
            row_sum_max=float(sums.max()) if len(sums) else 0.0,
            last_column_share=float(torch.bincount(last).max()) / len(last) if len(last) else 0.0,
        )

    def to(self, device: torch.device | str) -> SparseProjection:
        """The same projection on another device."""
        return SparseProjection(self.indices.to(device), self.weights.to(device), self.n_teacher)


def slice_columns(start: Tensor, rows: Tensor, weights: Tensor, columns: Tensor) -> Edges:
    """`SparseProjection.slice` for a bare column view."""
    first, count = start[columns], start[columns + 1] - start[columns]
    positions = torch.repeat_interleave(torch.arange(len(columns), device=columns.device), count)
    offset = torch.arange(len(positions), device=columns.device) - (count.cumsum(0) - count)[positions]
    entries = first[positions] + offset
    found = rows[entries].to(torch.int64)
    order = torch.argsort(found, stable=True)
    return Edges(found[order], positions[order], weights[entries][order])


def take_columns(view: ColumnView, columns: Tensor) -> ColumnView:
    """The view of the teacher tokens `columns` [k] alone, in this order."""
    count = view.start.diff()[columns]
    start = torch.cat([count.new_zeros(1), count.cumsum(0)])
    positions = torch.repeat_interleave(torch.arange(len(columns), device=columns.device), count)
    entries = torch.arange(len(positions), device=columns.device) + (view.start[columns] - start[:-1])[positions]
    return ColumnView(start, view.rows[entries], view.weights[entries])
