"""Tensors and what belongs to them in one safetensors file: moments and estimators on disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor


def write(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; an interrupted write leaves the file that was there."""
    from safetensors.torch import save_file

    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read(
    path: str | Path, expected: dict[str, str], device: torch.device | str, *, what: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that `what` wrote; raises ValueError unless its metadata has the `expected` items."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}): save it again") from error
    found = {key: metadata.get(key) for key in expected}
    if found != expected:
        raise ValueError(f"{path} holds {found}, expected {expected}: it was not written by this version of {what}")
    return tensors, metadata
