"""Chunks: which student and teacher positions cover the same text, seen from the positions that predict them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

COUNT_EPS = 1e-10


class Chunks(NamedTuple):
    """An alignment. Ids are label-space: position t carries the chunk of the token at t, -1 for none."""

    student: Tensor  # [B, T_s] int64 in {-1, 0, .., C-1}
    teacher: Tensor  # [B, T_t] int64
    valid: Tensor  # [B, C] bool
    correct: Tensor | None = None  # [B, C] bool: both sides spell the same text


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


def layout(chunks: Chunks, sample_mask: Tensor | None, exact_only: bool, dtype: torch.dtype) -> Layout:
    """Shift to predictors (the last position predicts nothing), keep the valid chunks, number them across the batch."""
    slots = chunks.valid.shape[1]
    student, teacher = (_flat(ids, slots) for ids in (chunks.student, chunks.teacher))
    n_student, n_teacher = (_count(ids, chunks.valid.numel()) for ids in (student, teacher))
    paired = (chunks.valid & chunks.correct if exact_only else chunks.valid).flatten()
    paired = paired & (n_student > 0) & (n_teacher > 0)
    weight = paired.to(dtype)
    if sample_mask is not None:
        weight = (weight.view(chunks.valid.shape) * sample_mask.to(dtype)[:, None]).flatten()
    return Layout(_only(student, paired), _only(teacher, paired), n_student, n_teacher, paired, weight)


def chunk_means(rows: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
    """Mean of the rows [N, W] of each chunk, [M, W]: the sum over (count + 1e-10)."""
    sums = rows.new_zeros(len(counts), rows.shape[1])
    if len(counts) == 0:
        return sums
    kept = torch.where((ids >= 0)[:, None], rows, 0.0)
    return sums.index_add(0, ids.clamp_min(0), kept) / (counts.to(rows.dtype) + COUNT_EPS)[:, None]


def next_token(mask: Tensor) -> Tensor:
    """Per position, the value of the position after it; zero at the end. [B, T]"""
    return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)


def _flat(ids: Tensor, slots: int) -> Tensor:
    predicted = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], 1)
    first = torch.arange(len(ids), device=ids.device)[:, None] * slots
    return torch.where(predicted >= 0, predicted + first, -1).flatten()


def _count(ids: Tensor, chunks: int) -> Tensor:
    counts = torch.zeros(chunks + 1, dtype=torch.int64, device=ids.device)
    return counts.index_add(0, ids + 1, torch.ones_like(ids))[1:]


def _only(ids: Tensor, kept: Tensor) -> Tensor:
    if len(kept) == 0:
        return torch.full_like(ids, -1)
    return torch.where((ids >= 0) & kept[ids.clamp_min(0)], ids, -1)
