"""Three small real language models and real text to try everything on, made on the spot from what ships with Python.

* *base*: Llama architecture, SentencePiece-style BPE with byte fallback, trained on prose alone;
* *expert*: the base, trained further on Python source;
* *other expert*: Qwen3 architecture, wider, byte-level BPE with a larger vocabulary, trained on source and prose.

`build()` trains them the first time and afterwards loads them from the user's cache directory.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from chassis.errors import ChassisError
from chassis.text.corpus import Document

HELD_OUT = ("fit", "validation", "test")
DOMAINS = ("source", "prose")


@dataclass(frozen=True)
class Testbed:
    """Folders of the three models, and documents by domain ("source", "prose") and split.

    `documents` holds the splits "fit", "validation" and "test", which no model has seen; `training` the documents that the
    models were trained on; `data / "source_fit.jsonl"` and its like are the same documents as files. `manifest` tells the
    steps, seconds, parameters and bits per byte on unseen text of each model under `manifest["models"]["base"]` and so on.
    """

    base: Path
    expert: Path
    other_expert: Path
    data: Path
    documents: dict[str, dict[str, list[Document]]]
    training: dict[str, list[Document]]
    manifest: dict


def build(progress: bool = True, *, size: str = "small") -> Testbed:
    """Train the testbed, or load it if it was trained before; `size="tiny"` makes models good for plumbing only.

    Raises ChassisError for an unknown size or a cache directory that cannot be written.
    """
    folder = cache_folder(size)
    if not (folder / "manifest.json").exists():
        _build_once(folder, size, progress)
    return load(folder)


def load(folder: Path) -> Testbed:
    """Read a testbed that `build` has written."""
    texts = {d: {s: _read(folder / "data" / f"{d}_{s}.jsonl") for s in ("train", *HELD_OUT)} for d in DOMAINS}
    return Testbed(
        base=folder / "base",
        expert=folder / "expert",
        other_expert=folder / "other_expert",
        data=folder / "data",
        documents={d: {s: texts[d][s] for s in HELD_OUT} for d in DOMAINS},
        training={d: texts[d]["train"] for d in DOMAINS},
        manifest=json.loads((folder / "manifest.json").read_text()),
    )


def cache_folder(size: str = "small") -> Path:
    """Where the testbed of this recipe, Python and torch lives: under $CHASSIS_CACHE, else the user's cache directory."""
    import torch

    from chassis.testbed.recipe import RECIPES

    if size not in RECIPES:
        raise ChassisError(f"testbed size {size!r}: expected one of {', '.join(map(repr, RECIPES))}")
    makers = {"python": sys.version_info[:2], "torch": torch.__version__, "machine": platform.machine()}
    key = hashlib.sha256(json.dumps([RECIPES[size].as_dict(), makers]).encode()).hexdigest()[:12]
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("CHASSIS_CACHE") or user_cache / "chassis")
    return root / "testbed" / f"{size}-{key}"


def _build_once(folder: Path, size: str, progress: bool) -> None:
    """Train in a folder beside the final one and rename it when all is there; a lock keeps a second process waiting."""
    from filelock import FileLock

    from chassis.testbed.make import make
    from chassis.testbed.recipe import RECIPES

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if (folder / "manifest.json").exists():
                return
            for left_over in folder.parent.glob(f".{folder.name}.*"):
                shutil.rmtree(left_over, ignore_errors=True)
            working = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            try:
                make(working, RECIPES[size], progress)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(working, folder)
            finally:
                shutil.rmtree(working, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or error
        raise ChassisError(
            f"cannot write the testbed to {folder} ({reason}); set CHASSIS_CACHE to another folder"
        ) from error


def _read(path: Path) -> list[Document]:
    with open(path, encoding="utf-8") as file:
        return [Document(**json.loads(line)) for line in file]
