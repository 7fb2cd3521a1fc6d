"""Chunks: which student and teacher positions cover the same text, seen from the positions that predict them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from chassis_kernels.backends import DTYPE_CODES
from chassis_kernels.parallel.groups import ONE_RANK, Parallel

COUNT_EPS = 1e-10


class Chunks(NamedTuple):
    """An alignment. Ids are label-space: position t carries the chunk of the token at t, -1 for none."""

    student: Tensor  # [B, T_s] int64 in {-1, 0, .., C-1}
    teacher: Tensor  # [B, T_t] int64
    valid: Tensor  # [B, C] bool
    correct: Tensor | None = None  # [B, C] bool: both sides spell the same text

    def shift(self) -> ShiftedChunks:
        """The same alignment by predicting position. Shift whole sequences, then take each sequence rank's positions."""
        if isinstance(self, ShiftedChunks):
            return self
        return ShiftedChunks(next_token(self.student, -1), next_token(self.teacher, -1), self.valid, self.correct)


class ShiftedChunks(Chunks):
    """An alignment whose position t carries the chunk of the token after t: the one it predicts."""


class Layout(NamedTuple):
    """Chunks over the flattened batch: M = B C of them, ids b C + c."""

    student: Tensor  # [B T_s] int64: the chunk that a row predicts, -1 where none or not valid
    teacher: Tensor  # [B T_t] int64
    student_count: Tensor  # [M] int64 rows
    teacher_count: Tensor  # [M] int64
    paired: Tensor  # [M] bool: valid, with at least one predicting row on either side
    weight: Tensor  # [M] float: the sample's mask where paired, else 0

    @property
    def counted(self) -> Tensor:
        """[M] bool: the chunks that enter the loss."""
        return self.weight != 0


def layout(
    chunks: Chunks,
    sample_mask: Tensor | None,
    exact_only: bool,
    dtype: torch.dtype,
    parallel: Parallel = ONE_RANK,
) -> Layout:
    """Shift to predictors (the last position predicts nothing), keep the valid chunks, number them across the batch.

    Ids are those of this rank's rows; counts, and what follows from them, are over the sequence ranks of `parallel`.
    """
    if parallel.sequence_shards > 1 and not isinstance(chunks, ShiftedChunks):
        raise ValueError("chunks of a sharded sequence must be shifted before they are sharded: Chunks.shift")
    slots, shifted = chunks.valid.shape[1], chunks.shift()
    student, teacher = (_flat(ids, slots) for ids in (shifted.student, shifted.teacher))
    found = torch.stack([counts(ids, chunks.valid.numel()) for ids in (student, teacher)])
    n_student, n_teacher = parallel.sequence_sum(found)
    paired = (chunks.valid & chunks.correct if exact_only else chunks.valid).flatten()
    paired = paired & (n_student > 0) & (n_teacher > 0)
    weight = paired.to(dtype)
    if sample_mask is not None:
        weight = (weight.view(chunks.valid.shape) * sample_mask.to(dtype)[:, None]).flatten()
    return Layout(only(student, paired), only(teacher, paired), n_student, n_teacher, paired, weight)


def check_chunks(
    student: Tensor,
    teacher: Tensor,
    sizes: tuple[int, int],
    chunks: Chunks,
    sample_mask: Tensor | None,
    parallel: Parallel = ONE_RANK,
) -> None:
    """ValueError unless logits [B, T, >= V], vocabularies, alignment and sample mask fit each other."""
    for name, logits, size in (("student", student, sizes[0]), ("teacher", teacher, sizes[1])):
        width = parallel.head(logits) if name == "student" and logits.dim() == 3 else logits.shape[-1]
        if logits.dim() != 3 or width < size or size == 0 or logits.dtype not in DTYPE_CODES:
            raise ValueError(
                f"{name}_logits are {logits.dtype} {tuple(logits.shape)}, expected floats [B, T, >= {size}], "
                f"with a projection of {sizes}"
            )
    batch = student.shape[0]
    expected = (("student", student.shape[:2]), ("teacher", (batch, teacher.shape[1])))
    if teacher.shape[0] != batch:
        raise ValueError(f"student_logits hold {batch} samples and teacher_logits {teacher.shape[0]}")
    for name, shape in expected:
        ids = getattr(chunks, name)
        if ids.shape != shape or ids.dtype != torch.int64:
            raise ValueError(f"chunks.{name} is {ids.dtype} {tuple(ids.shape)}, expected torch.int64 {tuple(shape)}")
    valid = chunks.valid
    if valid.dim() != 2 or valid.shape[0] != batch or valid.dtype != torch.bool:
        raise ValueError(f"chunks.valid is {valid.dtype} {tuple(valid.shape)}, expected torch.bool ({batch}, C)")
    if chunks.correct is not None and chunks.correct.shape != chunks.valid.shape:
        raise ValueError(f"chunks.correct has shape {tuple(chunks.correct.shape)}, expected {tuple(chunks.valid.shape)}")
    slots = chunks.valid.shape[1]
    for name in ("student", "teacher"):
        ids = getattr(chunks, name)
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling() and int(ids.max()) >= slots:
            raise ValueError(f"chunks.{name} holds id {int(ids.max())}, but there are {slots} chunk slots")
    if sample_mask is not None and sample_mask.shape != student.shape[:1]:
        raise ValueError(f"sample_mask has shape {tuple(sample_mask.shape)}, expected ({batch},)")


def check_temperature(temperature: float) -> None:
    """ValueError unless it is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: expected a positive number")


def chunk_means(rows: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
    """Mean of the rows [N, W] of each chunk, [M, W]: the sum over (count + 1e-10)."""
    sums = rows.new_zeros(len(counts), rows.shape[1])
    if len(counts) == 0:
        return sums
    kept = torch.where((ids >= 0)[:, None], rows, 0.0)
    return sums.index_add(0, ids.clamp_min(0), kept) / (counts.to(rows.dtype) + COUNT_EPS)[:, None]


def next_token(values: Tensor, end: int = 0) -> Tensor:
    """Per position, the value of the position after it; `end` at the end. [B, T]"""
    return torch.cat([values[:, 1:], torch.full_like(values[:, :1], end)], 1)


def _flat(ids: Tensor, slots: int) -> Tensor:
    first = torch.arange(len(ids), device=ids.device)[:, None] * slots
    return torch.where(ids >= 0, ids + first, -1).flatten()


def counts(ids: Tensor, chunks: int) -> Tensor:
    """Rows per chunk, [M] int64."""
    total = torch.zeros(chunks + 1, dtype=torch.int64, device=ids.device)
    return total.index_add(0, ids + 1, torch.ones_like(ids))[1:]


def only(ids: Tensor, kept: Tensor) -> Tensor:
    """The ids [N] of chunks that are kept [M] bool; -1 for the others."""
    if len(kept) == 0:
        return torch.full_like(ids, -1)
    return torch.where((ids >= 0) & kept[ids.clamp_min(0)], ids, -1)
