"""An adapter folded into a plain checkpoint that any engine serves at no extra cost.

Because the change is affine in the hidden state it folds into the head with nothing left to compute:

    W_U[cols] += (U V)^T        bias[cols] += c - mean U V

`merge_to` goes from a checkpoint on disk to another without loading the model: files are copied, and the head is read,
changed and written a block of rows at a time.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from chassis.adapter import Adapter
from chassis.bias import write_bias
from chassis.errors import ChassisError
from chassis.files import ensure_writable
from chassis.models import load_tokenizer, vocabulary_hash
from chassis.models.head import SCALE_HINTS, SOFTCAP_HINTS
from chassis.port import output_head
from chassis.stored import INDEX, OTHER_FILES, SINGLE, Entry, Stored, entries

BLOCK = 1 << 22  # numbers of the head that are held at once
UNTIED = "the embeddings were tied to the output head: untied, the checkpoint grows by one head"
FOLDED = "the output head holds no bias: it was folded into the weights (Adapter.fold_bias)"
BESIDE = "the output head holds no bias: it lies beside the weights, for chassis.bias.LogitBias"


@torch.no_grad()
def merge(model: torch.nn.Module, adapter: Adapter, tokenizer=None) -> list[str]:
    """Fold `adapter` into the head of a loaded `model`, in place; returns notices about what had to change on the way.

    Tied embeddings are untied first; for a head without bias see `Adapter.fold_bias`. Sums are formed in fp32 and rounded
    once. Raises ChassisError for an adapter of another base or a sum that is not finite, and then changes nothing.
    """
    head = output_head(model)
    adapter.check_base(
        width=head.weight.shape[1],
        vocab_size=head.weight.shape[0],
        vocabulary_hash=vocabulary_hash(tokenizer) if tokenizer is not None else "",
    )
    adapter.check_finite()
    adapter = adapter.to(head.weight.device)
    tied, bias = head.weight is model.get_input_embeddings().weight, getattr(head, "bias", None)
    notices = [UNTIED] * tied + [FOLDED] * (bias is None)
    weight = torch.empty_like(head.weight)
    for start, stop in _blocks(*weight.shape):
        rows = head.weight[start:stop]
        weight[start:stop] = _merged(rows, adapter.fold_bias() if bias is None else adapter, start)
    if bias is not None:
        bias.copy_(_merged_bias(bias, adapter))
    if tied:
        head.weight = torch.nn.Parameter(weight, requires_grad=head.weight.requires_grad)
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    else:
        head.weight.copy_(weight)
    return notices


def merge_to(base: str | Path, adapter: Adapter, folder: str | Path, *, bias: str = "fold") -> list[str]:
    """Write the checkpoint `base` (a folder or hub name) with `adapter` folded in to `folder`; returns notices.

    Needs memory for a block of the head, whatever the size of the model, and room on the disk for a copy. `folder` appears
    only when everything in it is on disk; a killed merge leaves a hidden folder beside it, called .`folder`.*
    Where the head holds no bias, `bias="fold"` replaces the adapter's by the nearest direction of the weights
    (`Adapter.fold_bias`), and `bias="side"` keeps it exactly, in a file for `chassis.bias.LogitBias`. Raises ChassisError
    if `folder` exists and is not empty, for an adapter of another base, and for a full disk.
    """
    if bias not in ("fold", "side"):
        raise ChassisError(f"bias {bias!r}: expected 'fold' or 'side'")
    folder = Path(folder)
    ensure_writable(folder.parent)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ChassisError(f"{folder} exists and is not empty: choose another folder, or remove it first")
    source = Stored.find(base)
    vocab_size, width = source.head.shape
    adapter.check_base(width=width, vocab_size=vocab_size, vocabulary_hash=vocabulary_hash(load_tokenizer(source.folder)))
    adapter.check_finite()
    beside = source.bias is None and bias == "side"
    folded = adapter.fold_bias() if source.bias is None and not beside else adapter
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _check_room(source, staging)
        _copy(source, staging)
        _change(source, adapter, folded, staging)
        if beside:
            write_bias(adapter, staging, **_after_the_head(staging / "config.json"))
        for path in filter(Path.is_file, staging.rglob("*")):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        staging.chmod(0o755)
        os.replace(staging, folder)
    except OSError as error:
        raise ChassisError(f"cannot write {folder}: {error.strerror or error}; nothing was left behind") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return [UNTIED] * source.tied + [BESIDE if beside else FOLDED] * (source.bias is None)


def _names(source: Stored) -> dict[str, str]:
    """What the source's files are called in the merged checkpoint; a head that they lack comes last, in its own file."""
    n_files = len(source.files) + source.lacks_head
    numbered = [f"model-{i + 1:05d}-of-{n_files:05d}.safetensors" for i in range(n_files)]
    names = numbered if n_files > 1 else [SINGLE]
    return dict(zip([*source.files, ""], names, strict=False))


def _check_room(source: Stored, folder: Path) -> None:
    needed = sum((source.folder / name).stat().st_size for name in source.files)
    needed += source.lacks_head * source.head.row_bytes * source.head.shape[0]
    if (free := shutil.disk_usage(folder).free) < needed:
        raise ChassisError(f"{folder.parent}: the copy takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


def _copy(source: Stored, folder: Path) -> None:
    for path in {path for pattern in OTHER_FILES for path in source.folder.glob(pattern) if path.name != INDEX}:
        shutil.copyfile(path, folder / path.name)
    for original, name in _names(source).items():
        if original:
            shutil.copyfile(source.folder / original, folder / name)


def _change(source: Stored, adapter: Adapter, folded: Adapter, folder: Path) -> None:
    """The merged head (and bias) into the copies in `folder`, and an index if there are several."""
    names = _names(source)
    if source.lacks_head:
        target = source.head.create(folder / names[""], source.head_name)
    else:
        target = _copied(source.head, names, folder)
    if source.tied:
        config = folder / "config.json"
        config.write_text(json.dumps(_untied(json.loads(config.read_text())), indent=2))
    for start, stop in _blocks(*source.head.shape):
        target.write(start, _merged(source.head.read(start, stop), folded, start))
    if source.bias is not None:
        bias = _copied(source.bias, names, folder)
        bias.write(0, _merged_bias(bias.read(0, bias.shape[0]), adapter))
    if len(names) > 1:
        shards = {name: entries(folder / name) for name in names.values()}
        size = sum((folder / name).stat().st_size for name in shards)
        weights = {key: name for name, shard in shards.items() for key in shard}
        index = {"metadata": {"total_size": size}, "weight_map": weights}
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def _copied(entry: Entry, names: dict[str, str], folder: Path) -> Entry:
    return entry._replace(path=folder / names[entry.path.name])


def _after_the_head(config: Path) -> dict[str, float]:
    """What a model of this config does to its logits after the head, as far as a bias beside the weights must know it."""
    raw = json.loads(config.read_text())
    raw |= raw.get("text_config") or {}
    scales = [raw[key] for key in SCALE_HINTS if raw.get(key, 1.0) != 1.0]
    if scales:
        raise ChassisError(f"this head scales its logits (by {scales[0]:g} or its inverse): merge with bias 'fold'")
    return {"softcap": next((raw[key] for key in SOFTCAP_HINTS if raw.get(key)), None)}


def _untied(config: dict) -> dict:
    parts = {key: _untied(value) if key == "text_config" else value for key, value in config.items()}
    return parts | {"tie_word_embeddings": False}


def _blocks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK // width)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _merged(rows: Tensor, adapter: Adapter, start: int) -> Tensor:
    """Rows [n, D] of the head from `start` on, plus their part of (U V)^T."""
    stop = start + len(rows)
    if adapter.cols is None:
        return _sum(rows, adapter.V[:, start:stop].T @ adapter.U.T, None)
    inside = (adapter.cols >= start) & (adapter.cols < stop)
    return _sum(rows, adapter.V[:, inside].T @ adapter.U.T, adapter.cols[inside] - start)


def _merged_bias(bias: Tensor, adapter: Adapter) -> Tensor:
    return _sum(bias, adapter.offset, adapter.cols)


def _sum(values: Tensor, change: Tensor, cols: Tensor | None) -> Tensor:
    """values, change added to rows `cols` (repeated ones too) in fp32, in the dtype of `values`."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    result = (wide + change if cols is None else wide.index_add(0, cols, change.to(wide.dtype))).to(values.dtype)
    if not math.isfinite(result.double().sum().item()):
        raise ChassisError(
            f"the merged head is NaN or infinite in {str(values.dtype).removeprefix('torch.')}: "
            "merge into a checkpoint in float32 or bfloat16, or look whether the base itself is sound"
        )
    return result
