"""Train a small causal LM on the CPU in a minute or two, and measure it in bits per byte."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from chassis.testbed.recipe import Schedule
from chassis.text.corpus import Document

# glibc's malloc.h: option, value while training, value afterwards. 32 MiB is the largest mmap threshold it takes; in one
# arena, the main one, threads share a heap that may grow, while others return a large buffer as soon as it is free.
MALLOPT = {"M_TRIM_THRESHOLD": (-1, 2**31 - 1, 2**17), "M_MMAP_THRESHOLD": (-3, 2**25, 2**17), "M_ARENA_MAX": (-8, 1, 0)}
MOST_THREADS = 8  # more only wait for each other in products this small


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> torch.Tensor:
    """Tokens [N] int64 of all documents, each opened as the tokenizer opens a text and closed by its end token."""
    encoded = tokenizer([d.text for d in documents], split_special_tokens=True)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (*ids, tokenizer.eos_token_id)])


def train(
    model: PreTrainedModel,
    streams: Sequence[torch.Tensor],
    schedule: Schedule,
    batch: int,
    length: int,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """One cycle of the schedule over batches of `batch` windows of `length` tokens, drawn in turn from the streams [N]."""
    generator = torch.Generator().manual_seed(seed)
    optimizers = _optimizers(model, schedule)
    cycles = [
        torch.optim.lr_scheduler.OneCycleLR(o, o.defaults["lr"], schedule.steps, pct_start=0.1, cycle_momentum=False)
        for o in optimizers
    ]
    window = torch.arange(length + 1)
    model.train()
    for step in range(schedule.steps):
        stream = streams[step % len(streams)]
        starts = torch.randint(len(stream) - length, (batch, 1), generator=generator)
        tokens = stream[starts + window]
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, cycle in zip(optimizers, cycles, strict=True):
            optimizer.step()
            cycle.step()
            optimizer.zero_grad()
        advance()
    model.eval()


def _optimizers(model: PreTrainedModel, schedule: Schedule) -> list[torch.optim.Optimizer]:
    adamw = {"lr": schedule.rate, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
    if schedule.muon_rate is None:
        return [torch.optim.AdamW(model.parameters(), **adamw)]
    ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    inner = [p for p in model.parameters() if p.ndim == 2 and id(p) not in ends]
    chosen = {id(p) for p in inner}
    return [
        torch.optim.Muon(inner, lr=schedule.muon_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for p in model.parameters() if id(p) not in chosen], **adamw),
    ]


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], length: int
) -> float:
    """Bits the model spends per UTF-8 byte of the documents, read in windows of `length` tokens that overlap by half.

    Every token but a document's first one is predicted from at least length/2 tokens, or from all there are.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    nats, half = 0.0, length // 2
    windows = []
    for document in documents:
        ids = [start, *tokenizer(document.text, add_special_tokens=False, split_special_tokens=True)["input_ids"]]
        for begin in range(0, max(len(ids) - 1 - half, 1), half):
            part = ids[begin : begin + length + 1]
            scored = len(part) - 1 if begin == 0 else len(part) - 1 - half
            windows.append((part, scored))
    windows.sort(key=lambda w: len(w[0]))
    for begin in range(0, len(windows), 16):
        group = windows[begin : begin + 16]
        width = max(len(part) for part, _ in group)
        tokens = torch.tensor([part + [start] * (width - len(part)) for part, _ in group])
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        for row, (part, scored) in zip(loss, group, strict=True):
            nats += row[len(part) - 1 - scored : len(part) - 1].double().sum().item()
    return nats / math.log(2) / sum(len(d.text.encode()) for d in documents)


@contextlib.contextmanager
def tuned_cpu() -> Iterator[None]:
    """Use the cores there are and, on glibc, reuse the buffers of a training step instead of returning them to the system.

    The random state, the number of threads and, but for its adapting thresholds, malloc are afterwards as before.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(min(available_cores(), MOST_THREADS))
    mallopt = ctypes.CDLL(None).mallopt if platform.libc_ver()[0] == "glibc" else None
    for option, value, _ in MALLOPT.values() if mallopt else ():
        mallopt(option, value)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        for option, _, value in MALLOPT.values() if mallopt else ():
            mallopt(option, value)


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
