"""Samples of text -> one batch: the student's tokens, each teacher's tokens, which of them cover the same text, and counts.

Runs in the data loader's workers; everything in a batch is a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from chassis.text.alignment import align
from chassis.text.spans import Spans, text_spans
from chassis_kernels.chunks import Chunks, layout, next_token


@dataclass
class Collator:
    """`tokenizers` has each teacher's tokenizer, None where it is the student's; `exact_only` its loss's choice of chunks.

    A batch holds input_ids, attention_mask [B, T], sample_mask [B], index [B], n_bytes [B] (bytes of text that the student
    predicts), counts [1 + teachers] float64 (next-token positions and chunks that count) and `teachers`: for each a dict
    with input_ids, attention_mask [B, T_t] and the chunks' student, teacher, valid, correct; empty for the student's own
    tokenizer.
    """

    student: object
    tokenizers: Sequence[object | None]
    exact_only: Sequence[bool]
    max_tokens: int
    caches: Mapping[int, object] = field(default_factory=dict)  # teacher -> Cache that holds its distributions

    def __call__(self, samples: Sequence[Mapping]) -> dict:
        texts = [sample["text"] for sample in samples]
        mine = text_spans(self.student, texts, max_length=self.max_tokens)
        mask = torch.from_numpy(mine.mask).long()
        sample_mask = torch.tensor([float(sample.get("sample_mask", 1.0)) for sample in samples])
        counts = [(next_token(mask) * (sample_mask != 0)[:, None]).sum().double()]
        teachers = []
        for i, (tokenizer, exact) in enumerate(zip(self.tokenizers, self.exact_only, strict=True)):
            batch, n_chunks = {}, counts[0]
            if tokenizer is not None:
                theirs = text_spans(tokenizer, texts, max_length=self.max_tokens)
                chunks = align(mine, theirs).chunks
                n_chunks = layout(chunks, sample_mask, exact, torch.float64).counted.sum().double()
                batch = {"input_ids": torch.from_numpy(theirs.ids), "attention_mask": torch.from_numpy(theirs.mask).long()}
                batch |= chunks._asdict()
            if i in self.caches:
                batch |= self.caches[i].batch([int(s["index"]) for s in samples], batch.get("input_ids", mine.ids))
            teachers.append(batch)
            counts.append(n_chunks)
        return {
            "input_ids": torch.from_numpy(mine.ids),
            "attention_mask": mask,
            "sample_mask": sample_mask,
            "index": torch.tensor([int(sample["index"]) for sample in samples]),
            "n_bytes": predicted_bytes(mine),
            "counts": torch.stack(counts),
            "teachers": teachers,
        }


def predicted_bytes(spans: Spans) -> torch.Tensor:
    """[B] int64: UTF-8 bytes from the end of each sample's first token to the end of its last one."""
    ends = torch.from_numpy(spans.end)
    last = ends.amax(1).clamp_min(0) if ends.shape[1] else torch.zeros(len(ends), dtype=torch.int64)
    real = torch.from_numpy(spans.mask)
    first = torch.where(real.any(1), ends.gather(1, real.long().argmax(1, keepdim=True))[:, 0], 0) if ends.shape[1] else last
    return last - first


def chunks_of(batch: Mapping[str, torch.Tensor]) -> Chunks | None:
    """The alignment in a teacher's part of a batch; None for the student's own tokenizer."""
    return Chunks(*(batch[name] for name in Chunks._fields)) if "student" in batch else None
