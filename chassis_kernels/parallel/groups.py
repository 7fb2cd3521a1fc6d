"""Parallel: over which ranks one batch's logits are spread, and the reductions that bring the parts together."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How the logits of one batch are spread over processes; pass it as `parallel=` to a loss.

    vocab: the tensor-parallel group. Each rank holds the columns vocab_start, vocab_start + 1, .. of a student head of
    `vocab_size` columns, padding included; vocab_start None: equal slabs in rank order, the last ones shorter, as
    torch.chunk and DTensor's Shard(-1) cut. Teachers' logits, ids and masks are the same on all of its ranks.
    sequence: the context-parallel group. Each rank holds some positions (any) of student and teacher with the chunk ids of
    those positions, after `Chunks.shift`; samples, `valid`, `correct` and sample masks are the same on all of its ranks.

    Every rank of both groups must make the same calls, backward included. The loss and its statistics are then the same
    numbers everywhere, and a rank's gradient is that of this one loss with respect to its own logits: add parameter
    gradients over `sequence`, do not average them. Groups of one rank change nothing and communicate nothing.
    """

    vocab: dist.ProcessGroup | None = None
    sequence: dist.ProcessGroup | None = None
    vocab_size: int | None = None
    vocab_start: int | None = None

    def __post_init__(self) -> None:
        if self.vocab_shards > 1 and self.vocab_size is None:
            raise ValueError("Parallel(vocab=...) needs vocab_size: the number of columns of the whole head")

    @property
    def vocab_shards(self) -> int:
        return 1 if self.vocab is None else self.vocab.size()

    @property
    def vocab_rank(self) -> int:
        return 0 if self.vocab is None else self.vocab.rank()

    @property
    def sequence_shards(self) -> int:
        return 1 if self.sequence is None else self.sequence.size()

    @property
    def sharded(self) -> bool:
        """Whether anything has to be communicated."""
        return self.vocab_shards > 1 or self.sequence_shards > 1

    @property
    def options(self) -> dict[str, Parallel]:
        """The keyword argument of the kernels; nothing where there is nothing to communicate."""
        return {"parallel": self} if self.sharded else {}

    def head(self, logits: Tensor) -> int:
        """How many columns the head has that these logits [.., W] of this rank are a slab of."""
        return logits.shape[-1] if self.vocab_shards == 1 else self.vocab_size

    def slab(self, logits: Tensor) -> range:
        """The columns of the head that these logits [.., W] of this rank are. ValueError if there cannot be W of them."""
        width = logits.shape[-1]
        if self.vocab_shards == 1:
            return range(width)
        start = self.vocab_start
        if start is None:
            size = -(-self.vocab_size // self.vocab_shards)
            start = min(self.vocab.rank() * size, self.vocab_size)
            wanted = min(size, self.vocab_size - start)
            if width != wanted:
                raise ValueError(
                    f"rank {self.vocab.rank()} of {self.vocab_shards} holds {width} of {self.vocab_size} columns, expected "
                    f"{wanted}: give vocab_start where the slabs are not equal"
                )
        if start < 0 or start + width > self.vocab_size:
            raise ValueError(f"columns {start} to {start + width - 1} are not within a head of {self.vocab_size} columns")
        return range(start, start + width)

    def cut(self, logits: Tensor, size: int) -> tuple[Tensor, Parallel]:
        """The logits without the head's columns beyond `size`, and how those that are left are spread."""
        slab = self.slab(logits)
        width = max(0, min(len(slab), size - slab.start))
        left = logits if width == len(slab) else logits[..., :width]
        if self.vocab_shards == 1:
            return left, self
        size = min(self.vocab_size, size)
        return left, dataclasses.replace(self, vocab_size=size, vocab_start=min(slab.start, size))

    def select(self, logits: Tensor, columns: Tensor) -> tuple[Tensor, Parallel]:
        """The logits within the ascending `columns` [k] of the head, and how these k are spread."""
        left = logits.index_select(-1, self.own(logits, columns))
        if self.vocab_shards == 1:
            return left, self
        before = int((columns < self.slab(logits).start).sum())
        return left, dataclasses.replace(self, vocab_size=len(columns), vocab_start=before)

    def own(self, logits: Tensor, columns: Tensor) -> Tensor:
        """Those of the ascending `columns` [k] of the head that these logits hold, counted from their first."""
        slab = self.slab(logits)
        return columns[(columns >= slab.start) & (columns < slab.stop)] - slab.start

    def vocab_sum(self, part: Tensor) -> Tensor:
        """The parts of the vocabulary ranks added up."""
        return _Sum.apply(part, self.vocab) if self.vocab_shards > 1 else part

    def vocab_max(self, part: Tensor) -> Tensor:
        return _max(part, self.vocab) if self.vocab_shards > 1 else part

    def sequence_sum(self, part: Tensor) -> Tensor:
        """The parts of the sequence ranks added up."""
        return _Sum.apply(part, self.sequence) if self.sequence_shards > 1 else part

    def sequence_max(self, part: Tensor) -> Tensor:
        return _max(part, self.sequence) if self.sequence_shards > 1 else part

    def vocab_gather(self, part: Tensor) -> Tensor:
        """The parts [N, m] of the vocabulary ranks side by side, in rank order: [N, shards * m]."""
        if self.vocab_shards == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.vocab_shards)]
        dist.all_gather(parts, part.contiguous(), group=self.vocab)
        return torch.cat(parts, 1)


ONE_RANK = Parallel()


class _Sum(torch.autograd.Function):
    """The sum over the ranks. What is made of it is the same on every rank and counts once: so does its gradient."""

    @staticmethod
    def forward(ctx, part, group):
        total = part.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _max(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    best = part.contiguous().clone()
    dist.all_reduce(best, dist.ReduceOp.MAX, group=group)
    return best
