"""Where the teachers' distributions come from: a model run beside the student, or a cache on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from chassis.distill.collator import chunks_of
from chassis.distill.fused_head import operands
from chassis.models import Head, capture
from chassis_kernels.sparse import SparseProjection
from chassis_kernels.teacher import TeacherHead, TopK
from chassis_kernels.xtoken_loss import TeacherBatch


class Teacher(Protocol):
    """`batch` gives one micro-batch's distributions, from the student's part and the teacher's own part of a batch."""

    name: str
    vocab_size: int
    projection: SparseProjection | None

    def batch(self, inputs: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> TeacherBatch: ...


@dataclass
class LiveTeacher:
    """A causal LM run without gradients; with `offload` it visits the student's device for its own forward pass only.

    With its `head` it gives hidden states and the head's weight, for a loss that makes of them the columns it compares:
    [T, V_t] logits never exist. None: it gives its logits.
    """

    model: torch.nn.Module
    vocab_size: int
    name: str
    projection: SparseProjection | None = None
    offload: bool = False
    head: Head | None = None

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)

    def batch(self, inputs: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> TeacherBatch:
        shared = inputs if self.projection is None else own
        ids, mask = shared["input_ids"], shared["attention_mask"]
        with torch.no_grad(), self._on(ids.device):
            given = self._logits(ids, mask) if self.head is None else self._hidden(ids, mask)
        if self.projection is None:
            return TeacherBatch(given)
        if self.projection.indices.device != ids.device:
            self.projection = self.projection.to(ids.device)
        return TeacherBatch(given, self.projection, chunks_of(own), ids, mask)

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    def _hidden(self, ids: Tensor, mask: Tensor) -> TeacherHead:
        """The weight stays on the device as long as the loss needs it, also when the model leaves."""
        hidden, weight, bias, softcap = operands(self.head, capture(self.model, ids, mask).final)
        return TeacherHead(hidden, weight.detach(), bias, softcap)

    @contextlib.contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        self.model.to(device)
        try:
            yield
        finally:
            if self.offload:
                self.model.to("cpu")


@dataclass
class CachedTeacher:
    """A teacher whose largest log-probabilities come with the batch; no model in memory."""

    vocab_size: int
    name: str
    projection: SparseProjection | None = None

    def batch(self, inputs: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> TeacherBatch:
        top = TopK(own["top_log_probs"].float(), own["top_ids"])
        if self.projection is None:
            return TeacherBatch(top)
        return TeacherBatch(top, self.projection, chunks_of(own), own["input_ids"], own["attention_mask"])


@contextlib.contextmanager
def batches(teachers: Sequence[Teacher], inputs: Mapping) -> Iterator[list[TeacherBatch]]:
    """Run each teacher in order; what they gave is released when the block ends, also by an error."""
    found: list[TeacherBatch] = []
    try:
        for teacher, own in zip(teachers, inputs["teachers"], strict=True):
            found.append(teacher.batch(inputs, own))
        yield found
    finally:
        found.clear()
