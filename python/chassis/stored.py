"""A causal LM's checkpoint on disk: which tensors its files hold and where its output head lies, without loading it."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from chassis.errors import ModelError
from chassis.models import load_tokenizer
from chassis.models.forward import name_of, unembedding_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OTHER_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")  # config, tokenizer, licence; never code
CODES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Entry(NamedTuple):
    """A tensor in a safetensors file: the file, dtype (None: quantised), shape, first byte."""

    path: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start to stop."""
        with open(self.path, "rb") as file:
            file.seek(self.start + start * self.row_bytes)
            data = bytearray(file.read((stop - start) * self.row_bytes))
        return torch.frombuffer(data, dtype=self.dtype).view(-1, *self.shape[1:])

    def write(self, start: int, rows: Tensor) -> None:
        """Put `rows` in the place of those from `start` on."""
        with open(self.path, "r+b") as file:
            file.seek(self.start + start * self.row_bytes)
            file.write(rows.contiguous().view(-1).view(torch.uint8).numpy().data)

    def create(self, path: Path, name: str) -> Entry:
        """A file of one tensor like this one, called `name` in it, with zeros for values."""
        size = math.prod(self.shape) * self.dtype.itemsize
        code = next(code for code, dtype in CODES.items() if dtype == self.dtype)
        entry = {"dtype": code, "shape": self.shape, "data_offsets": [0, size]}
        header = json.dumps({"__metadata__": {"format": "pt"}, name: entry}).encode()
        header += b" " * (-len(header) % 8)
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + size)
        return self._replace(path=path, start=8 + len(header))


def entries(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file: 8 bytes with the length of a header, the header in JSON, the values."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    places = {name: (item, 8 + length + item["data_offsets"][0]) for name, item in header.items()}
    return {name: Entry(path, CODES.get(item["dtype"]), tuple(item["shape"]), at) for name, (item, at) in places.items()}


@dataclass(frozen=True)
class Stored:
    """`head` [V, D] is the entry of the input embedding where a `tied` checkpoint does not store its head (`lacks_head`).

    `head_name` is the head's name in the model.
    """

    folder: Path
    files: list[str]
    head: Entry
    head_name: str
    bias: Entry | None
    tied: bool
    lacks_head: bool

    @classmethod
    def find(cls, base: str | Path) -> Stored:
        """That of a folder, or of a hub name, which is downloaded first; ModelError where there is no floating head."""
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = _local(base)
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        if SINGLE in files:
            files = [SINGLE]
        elif (folder / INDEX).exists():
            files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        if not files:
            raise ModelError(f"{base}: no *.safetensors in it; convert the checkpoint with model.save_pretrained(folder)")
        try:
            with torch.device("meta"):
                config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{base}: its config.json is not one of a causal LM ({error})") from error
        head, embedding = unembedding_of(model), model.get_input_embeddings()
        name = name_of(model, head)
        tied = head.weight is embedding.weight
        found = _by_module(model, {key: entry for file in files for key, entry in entries(folder / file).items()})
        lacks_head = tied and f"{name}.weight" not in found
        read = name_of(model, embedding) if lacks_head else name
        bias = _pick(found, f"{name}.bias", base) if getattr(head, "bias", None) is not None else None
        return cls(folder, files, _pick(found, f"{read}.weight", base), f"{name}.weight", bias, tied, lacks_head)


def _local(base: str | Path) -> Path:
    load_tokenizer(base)  # says what is wrong with a name that leads nowhere
    folder = Path(base).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(base), allow_patterns=["*.safetensors", *OTHER_FILES]))


def _by_module(model: torch.nn.Module, found: dict[str, Entry]) -> dict[str, Entry]:
    """The same entries under the names the tensors have in the model: checkpoints may use older ones, or no prefix."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    names = model.state_dict()
    return {rename_source_key(key, renamings, [], model.base_model_prefix, names)[0]: e for key, e in found.items()}


def _pick(found: dict[str, Entry], name: str, base: str | Path) -> Entry:
    entry = found.get(name)
    if entry is None:
        raise ModelError(f"{base}: no tensor {name!r} in its safetensors; load it and save it with model.save_pretrained")
    if entry.dtype is None:
        raise ModelError(f"{base}: {name!r} is quantised; merge into the checkpoint it was made from")
    return entry
