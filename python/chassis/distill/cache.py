"""A teacher's distributions on disk, so that it runs once for many students: the top k log-probabilities of every position.

    folder/index.json                 teacher, tokenizer hash, sizes, fingerprint of the samples, and each shard's checksum
    folder/shard-00000.safetensors    offsets [n + 1], tokens [N], ids [N, k] int32, log_probs [N, k] float16 of n samples
    folder/tokenizer*                 the teacher's tokenizer

Shards are written whole, one after another, and the index after each of them: a killed job goes on with the next one.
What a position does not list has the rest of the probability, spread evenly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from chassis.errors import ChassisError
from chassis.files import ensure_writable, write_file
from chassis.models import load_tokenizer, vocabulary_hash
from chassis.text.spans import text_spans

INDEX = "index.json"
SHARDS_IN_MEMORY = 4


@dataclass
class Index:
    """What a cache is of. `shards` {file: {"samples", "sha256", "bytes"}} in order."""

    teacher: str
    vocabulary_hash: str
    vocab_size: int
    top_k: int
    max_tokens: int
    samples: int
    samples_per_shard: int
    fingerprint: str
    shards: dict[str, dict] = field(default_factory=dict)

    @property
    def done(self) -> int:
        return sum(shard["samples"] for shard in self.shards.values())

    @property
    def n_bytes(self) -> int:
        return sum(shard["bytes"] for shard in self.shards.values())


def write_cache(
    folder: str | Path,
    model: torch.nn.Module,
    tokenizer,
    texts: Sequence[str],
    *,
    name: str,
    max_tokens: int,
    top_k: int = 64,
    samples_per_shard: int = 256,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Index:
    """Run `model` over `texts` and keep its `top_k` log-probabilities; goes on where an earlier call was stopped.

    Raises ChassisError for a folder that holds the cache of another teacher, tokenizer or text.
    """
    folder = ensure_writable(folder)
    index = Index(
        name,
        vocabulary_hash(tokenizer),
        len(tokenizer),
        top_k,
        max_tokens,
        len(texts),
        samples_per_shard,
        fingerprint(texts),
    )
    if not 1 <= top_k <= len(tokenizer):
        raise ChassisError(f"top_k is {top_k}: expected 1..{len(tokenizer)}, the size of the teacher's vocabulary")
    if (folder / INDEX).exists():
        earlier = read_index(folder)
        changed = [k for k, v in asdict(index).items() if k != "shards" and asdict(earlier)[k] != v]
        if changed:
            raise ChassisError(f"{folder} holds a cache with other {', '.join(changed)}: give another folder or remove it")
        index = earlier
    else:
        tokenizer.save_pretrained(folder)
    for start in range(index.done, len(texts), samples_per_shard):
        part = texts[start : start + samples_per_shard]
        file = f"shard-{start // samples_per_shard:05d}.safetensors"
        path = write_file(folder / file, _shard(model, tokenizer, part, index, batch_size))
        index.shards[file] = {"samples": len(part), "sha256": _checksum(path), "bytes": path.stat().st_size}
        write_file(folder / INDEX, json.dumps(asdict(index), indent=1))
        progress(index.done, len(texts))
    return index


def read_index(folder: str | Path) -> Index:
    """The index of a cache; ChassisError if there is none or it is damaged."""
    path = Path(folder) / INDEX
    try:
        return Index(**json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise ChassisError(
            f"{folder}: no teacher cache here ({INDEX} is missing); write one with chassis distill cache"
        ) from error
    except (OSError, TypeError, ValueError) as error:
        raise ChassisError(f"{path} is damaged ({error}): write the cache again") from error


class Cache:
    """A finished cache, read sample by sample. Pickles for the data loader's workers.

    Raises ChassisError, naming the file, for a cache that is not finished, cut short or altered, and for samples it does
    not hold.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.index = Path(folder), read_index(folder)
        if self.index.done != self.index.samples:
            raise ChassisError(
                f"{folder}: {self.index.done} of {self.index.samples} samples are cached: finish it with the same chassis "
                "distill cache"
            )
        for file, shard in self.index.shards.items():
            size = (self.folder / file).stat().st_size if (self.folder / file).exists() else None
            if size != shard["bytes"]:
                given = "missing" if size is None else f"{size} bytes long, expected {shard['bytes']}"
                raise ChassisError(f"{self.folder / file} is {given}: remove {INDEX} and write the cache again")

    def check_samples(self, texts: Sequence[str]) -> None:
        """Raise ChassisError unless the cache was made of exactly these samples."""
        if fingerprint(texts) != self.index.fingerprint:
            raise ChassisError(
                f"{self.folder} was made of other samples ({self.index.samples}, here {len(texts)}): it needs the same "
                "data, packing and order"
            )

    def check_tokenizer(self, tokenizer) -> None:
        """Raise ChassisError unless the cache is of this tokenizer's tokens."""
        if vocabulary_hash(tokenizer) != self.index.vocabulary_hash:
            raise ChassisError(
                f"{self.folder} was made for another tokenizer, that of {self.index.teacher} with {self.index.vocab_size} "
                f"tokens, here {len(tokenizer)}: write a cache in another folder"
            )

    def batch(self, samples: Sequence[int], input_ids: np.ndarray | torch.Tensor) -> dict[str, torch.Tensor]:
        """{"top_ids" [B, T, k] int64, "top_log_probs" [B, T, k] float16} beside input_ids [B, T] of the same samples."""
        input_ids = torch.as_tensor(input_ids)
        shape = (*input_ids.shape, self.index.top_k)
        ids, log_probs = torch.full(shape, -1, dtype=torch.int64), torch.full(shape, -torch.inf, dtype=torch.float16)
        for row, sample in enumerate(samples):
            tokens, its_ids, its_log_probs = self._sample(sample)
            n = len(tokens)
            if n > input_ids.shape[1] or not torch.equal(tokens.long(), input_ids[row, :n]):
                raise ChassisError(f"{self.folder}: sample {sample} was cut into other tokens when the cache was written")
            ids[row, :n], log_probs[row, :n] = its_ids.long(), its_log_probs
        return {"top_ids": ids, "top_log_probs": log_probs}

    def _sample(self, sample: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not 0 <= sample < self.index.samples:
            raise ChassisError(f"{self.folder}: no sample {sample}, it holds {self.index.samples}")
        number, place = divmod(sample, self.index.samples_per_shard)
        file = f"shard-{number:05d}.safetensors"
        shard = _load_shard(str(self.folder / file), self.index.shards[file]["sha256"])
        start, stop = shard["offsets"][place : place + 2].tolist()
        return tuple(shard[key][start:stop] for key in ("tokens", "ids", "log_probs"))

    def tokenizer(self):
        """The teacher's tokenizer, which lies beside the shards."""
        return load_tokenizer(self.folder)


@lru_cache(SHARDS_IN_MEMORY)
def _load_shard(path: str, sha256: str) -> dict[str, torch.Tensor]:
    try:
        if _checksum(Path(path)) != sha256:
            raise ChassisError(f"{path} was altered since it was written: remove {INDEX} and write the cache again")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ChassisError(f"{path} cannot be read ({error}): remove {INDEX} and write the cache again") from error


@torch.no_grad()
def _shard(model, tokenizer, texts: Sequence[str], index: Index, batch_size: int) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    parts = {"tokens": [], "ids": [], "log_probs": []}
    lengths = [0]
    for start in range(0, len(texts), batch_size):
        spans = text_spans(tokenizer, texts[start : start + batch_size], max_length=index.max_tokens)
        ids, mask = torch.from_numpy(spans.ids).to(device), torch.from_numpy(spans.mask).to(device)
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[..., : index.vocab_size]
        for row in range(len(ids)):
            own = logits[row][mask[row]].float()
            log_probs, columns = top_k_of(own, index.top_k)
            parts["log_probs"].append(log_probs.half().cpu())
            parts["ids"].append(columns.int().cpu())
            parts["tokens"].append(ids[row][mask[row]].int().cpu())
            lengths.append(len(own))
    tensors = {name: torch.cat(values) for name, values in parts.items()}
    return tensors | {"offsets": torch.tensor(lengths).cumsum(0)}


def top_k_of(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest log-probabilities of logits [..., V], in nats, and their ids; [..., k] each."""
    value, column = logits.topk(k, dim=-1)
    return value - logits.logsumexp(-1, keepdim=True), column


def fingerprint(texts: Sequence[str]) -> str:
    """Hash of samples in order."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
