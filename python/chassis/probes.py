"""Documents -> windows of tokens -> batches -> rows of hidden states, with one forward of each model per batch.

Rows are chosen by the attention mask, never by position arithmetic, so that padding side and batch size cannot change
them. Nothing here holds more than one batch.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from chassis.errors import ChassisError
from chassis.experts import AnyExpert
from chassis.files import write_file
from chassis.models import capture
from chassis.text.corpus import Document
from chassis_kernels import Moments, pages
from chassis_kernels.rows import not_finite

KEYS = "fit_windows.safetensors"
AHEAD = 8  # batches of windows that an expert is told of at a time


@dataclass(frozen=True, eq=False)
class Window:
    """A run of tokens of one document. `n_bytes`: UTF-8 bytes of the text that ids[1:] spell."""

    ids: np.ndarray  # int32
    document: str
    n_bytes: int

    @cached_property
    def key(self) -> str:
        """Hash of the token ids: equal for equal text."""
        return hashlib.blake2b(self.ids.tobytes(), digest_size=8).hexdigest()


@dataclass
class Rows:
    """One batch: n rows chosen by mask and `positions`, in reading order."""

    final: torch.Tensor  # [n, D] input of the base's unembedding
    expert: torch.Tensor  # [n, E] rows that the expert's readout maps to logits
    layers: dict[int, torch.Tensor]  # layer -> [n, D] residual stream
    next_ids: torch.Tensor  # [n] the token that follows, -1 at the end of a window
    n_bytes: int  # bytes of the text that next_ids spell
    window: torch.Tensor  # [n] which window of the batch a row belongs to

    @property
    def nbytes(self) -> int:
        tensors = self.final, self.expert, self.next_ids, self.window, *self.layers.values()
        return sum(tensor.nbytes for tensor in tensors)

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Rows:
        """Several batches as one; layers are left behind."""
        if len(parts) == 1:
            return parts[0]
        names = "final", "expert", "next_ids", "window"
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return cls(**joined, layers={}, n_bytes=sum(part.n_bytes for part in parts))


def make_windows(documents: Iterable[Document], tokenizer, *, length: int = 128, minimum: int = 2) -> list[Window]:
    """Tokenize documents with `tokenizer` and cut them into windows of at most `length` tokens.

    Windows shorter than `minimum` tokens and exact repeats of a window are left out. They come in order of their hashes:
    a random order that does not depend on how the documents were listed. Raises ChassisError when no window is left.
    """
    if length < 2:
        raise ChassisError(f"window length {length}: expected at least 2 tokens")
    if not getattr(tokenizer, "is_fast", False):
        raise ChassisError(
            f"{type(tokenizer).__name__} is not a fast tokenizer and cannot say which text a token covers: "
            "load one with a tokenizer.json (AutoTokenizer converts most models)"
        )
    result, seen, n_documents = [], set(), 0
    for document in documents:
        n_documents += 1
        encoding = tokenizer(document.text, return_offsets_mapping=True, verbose=False)
        ids, offsets = np.asarray(encoding["input_ids"], dtype=np.int32), encoding["offset_mapping"]
        for start in range(0, len(ids), length):
            part = ids[start : start + length]
            if len(part) < minimum:
                continue
            text = document.text[offsets[start][1] : offsets[start + len(part) - 1][1]]
            window = Window(part, document.id, len(text.encode()))
            if window.key not in seen:
                seen.add(window.key)
                result.append(window)
    if not result:
        raise ChassisError(f"{n_documents} documents gave no window of {minimum} tokens or more: give more text")
    return sorted(result, key=lambda window: window.key)


def check_disjoint(fit: Sequence[Window], evaluation: Sequence[Window]) -> None:
    """Raise ChassisError if a window of `evaluation` was fitted on (by hash of its token ids)."""
    fitted = {window.key for window in fit}
    shared = [window for window in evaluation if window.key in fitted]
    if shared:
        raise ChassisError(
            f"{len(shared)} of {len(evaluation)} evaluation windows are also in the text that is fitted on "
            f"(first: document {shared[0].document}): numbers on them would mean nothing; give other documents"
        )


def save_keys(windows: Sequence[Window], folder: str | Path) -> Path:
    """Keep the hashes of the windows that were fitted on beside the fit, for `check_not_fitted`."""
    keys = torch.tensor(sorted(int(window.key, 16) - 2**63 for window in windows))
    return write_file(Path(folder) / KEYS, {"keys": keys})


def check_not_fitted(folder: str | Path, windows: Sequence[Window]) -> None:
    """Raise ChassisError if one of `windows` was fitted on by the fit saved in `folder`."""
    path = Path(folder) / KEYS
    if not path.exists():
        raise ChassisError(f"{path} is missing: without it nobody can tell whether this text was fitted on; fit again")
    fitted = set(load_file(path)["keys"].tolist())
    shared = [window for window in windows if int(window.key, 16) - 2**63 in fitted]
    if shared:
        raise ChassisError(
            f"{len(shared)} of {len(windows)} windows were fitted on by {folder} (first: document {shared[0].document}): "
            "give text that was held out"
        )


def fingerprint(windows: Iterable[Window]) -> str:
    """Hash of a set of windows, whatever their order."""
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(window.key for window in windows):
        digest.update(key.encode())
    return digest.hexdigest()


@dataclass
class Probe:
    """Runs base and expert over windows. `seconds` adds up the time spent in their forward passes; `pairs` are moments that
    an expert adds to (`experts.ProbabilityExpert`)."""

    model: torch.nn.Module
    expert: AnyExpert
    layers: tuple[int, ...] = ()
    positions: str = "all"
    batch_size: int = 16
    padding_side: str = "right"
    pairs: Moments | None = None
    seconds: dict[str, float] = field(default_factory=lambda: {"base": 0.0, "expert": 0.0})

    def __post_init__(self) -> None:
        if self.positions not in ("all", "last"):
            raise ChassisError(f"positions {self.positions!r}: expected 'all' or 'last'")
        if self.padding_side not in ("left", "right"):
            raise ChassisError(f"padding_side {self.padding_side!r}: expected 'left' or 'right'")
        if self.batch_size < 1:
            raise ChassisError(f"batch_size {self.batch_size}: expected at least 1")
        pages.keep_heap()

    def batches(self, windows: Sequence[Window], skip: int = 0) -> Iterator[Rows]:
        """Rows of each batch in turn, from batch number `skip` on."""
        for number, start in enumerate(range(skip * self.batch_size, len(windows), self.batch_size)):
            if self.expert.log_probs and number % AHEAD == 0:
                self._prepare(windows[start : start + AHEAD * self.batch_size])
            yield self.rows(windows[start : start + self.batch_size])

    def _prepare(self, windows: Sequence[Window]) -> None:
        started = time.perf_counter()
        self.expert.prepare(windows)
        self.seconds["expert"] += time.perf_counter() - started

    @torch.no_grad()
    def rows(self, windows: Sequence[Window]) -> Rows:
        """One forward of each model over `windows`."""
        device = next(self.model.parameters()).device
        ids, mask, next_ids = pad([w.ids for w in windows], self.padding_side)
        ids, mask, next_ids = ids.to(device), mask.to(device), next_ids.to(device)
        started = time.perf_counter()
        base = capture(self.model, ids, mask, layers=self.layers)
        middle = time.perf_counter()
        found = self.expert.rows(ids, mask, base.final, **({} if self.pairs is None else {"pairs": self.pairs}))
        self.seconds["base"] += middle - started
        self.seconds["expert"] += time.perf_counter() - middle
        expert, said = found if self.expert.log_probs else (found, mask.bool())
        last = mask.bool() & (mask.flip(1).cumsum(1).flip(1) == 1)
        chosen = said & last if self.positions == "last" else said
        if not self.expert.log_probs:
            expert = _take(expert, chosen)
        elif self.positions == "last":
            expert = expert[last[said]]
        index = torch.arange(len(windows), device=device)[:, None].expand_as(chosen)
        rows = Rows(
            final=base.final[chosen],
            expert=expert,
            layers={layer: states[chosen] for layer, states in base.layers.items()},
            next_ids=next_ids[chosen],
            n_bytes=sum(w.n_bytes for w in windows),
            window=index[chosen],
        )
        self._check_finite(rows, windows)
        return rows

    def _check_finite(self, rows: Rows, windows: Sequence[Window]) -> None:
        for name, states in (("base", rows.final), (f"expert {self.expert.name!r}", rows.expert)):
            bad = not_finite(states)
            if bad.any():
                document = windows[int(rows.window[bad][0])].document
                raise ChassisError(
                    f"{int(bad.sum())} of {len(bad)} rows of the {name} are NaN or infinite (first in document "
                    f"{document}): try dtype float32, or leave that document out"
                )


def _take(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """values[chosen], of [B, T, E] and [B, T] bool, in memory that is kept for the next batch: [n, V] rows are large."""
    rows = chosen.flatten().nonzero()[:, 0]
    out = pages.empty((len(rows), values.shape[-1]), values.dtype, values.device)
    return torch.index_select(values.flatten(0, 1), 0, rows, out=out)


def pad(sequences: Sequence[np.ndarray], side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences of token ids -> (ids, mask, next_ids), each [B, T] int64; next_ids is -1 where nothing follows."""
    length = max(len(s) for s in sequences)
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    mask, next_ids = torch.zeros_like(ids), torch.full_like(ids, -1)
    for row, sequence in enumerate(sequences):
        start = 0 if side == "right" else length - len(sequence)
        values = torch.from_numpy(sequence).long()
        ids[row, start : start + len(sequence)] = values
        mask[row, start : start + len(sequence)] = 1
        next_ids[row, start : start + len(sequence) - 1] = values[1:]
    return ids, mask, next_ids
