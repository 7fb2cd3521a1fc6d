"""Writing results so that a killed process or a full disk leaves either the old files or the new ones."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from chassis.errors import ChassisError

CONFIG = "config.json"


def write_file(
    path: str | Path, content: str | bytes | dict[str, torch.Tensor], *, metadata: dict[str, str] | None = None
) -> Path:
    """Write text, bytes or a safetensors dict to a temporary neighbour, flush it to disk, then rename it into place.

    `metadata` goes into the header of a safetensors file.
    """
    path = Path(path)
    ensure_writable(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        if isinstance(content, dict):
            save_file(content, temporary, metadata={"format": "pt"} | (metadata or {}))
        else:
            Path(temporary).write_bytes(content.encode() if isinstance(content, str) else content)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ChassisError(f"cannot write {path}: {reason}; free some space or choose another place") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def write_folder(folder: str | Path, files: dict[str, str | bytes | dict[str, torch.Tensor]]) -> Path:
    """Write several files into `folder`: all of them are complete on disk before the first takes its name."""
    folder = ensure_writable(folder)
    staging = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
    try:
        for name, content in files.items():
            write_file(staging / name, content)
        for name in files:
            os.replace(staging / name, folder / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def ensure_writable(folder: str | Path) -> Path:
    """Make `folder` and its parents; raises ChassisError at once if nothing can be written there."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ChassisError(f"cannot write to {folder}: {error.strerror or error}; choose another output folder") from error
    return folder


def ensure_config_is(folder: str | Path, key: str, value: str | None = None) -> Path:
    """`ensure_writable`, for who writes a config.json: raises ChassisError too if the one that `folder` holds lacks `key`,
    or has another `value` there. It belongs to a model then, or to something else that would be lost."""
    folder = ensure_writable(folder)
    try:
        found = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        return folder
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or key not in found or value not in (None, found[key]):
        raise ChassisError(f"{folder} holds the {CONFIG} of something else, a model perhaps: choose another output folder")
    return folder
