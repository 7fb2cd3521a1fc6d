"""Statistics kept on disk while they are collected, so that a killed fit goes on where it was."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from chassis.errors import ChassisError
from chassis.files import write_file
from chassis.statistics import Statistics

NAME = "statistics.safetensors"


class Checkpoint:
    """`folder`/statistics.safetensors for one fit; `identity` names the models, windows and settings it belongs to."""

    def __init__(self, folder: str | Path | None, identity: str, every_seconds: float = 30.0) -> None:
        self.path = None if folder is None else Path(folder) / NAME
        digest = hashlib.blake2b(identity.encode(), digest_size=32).digest()
        self.identity = torch.tensor(list(digest), dtype=torch.uint8)
        self.every_seconds, self._last = every_seconds, time.monotonic()

    def load(self, statistics: Statistics) -> int:
        """Fill `statistics` and return how many batches are in it; 0 when there is nothing for this fit to go on from.

        Raises ChassisError for a damaged file.
        """
        if self.path is None or not self.path.exists():
            return 0
        try:
            state = load_file(self.path)
        except (SafetensorError, OSError) as error:
            raise ChassisError(f"{self.path} is damaged ({error}): remove it to start the fit over") from error
        if not torch.equal(state.pop("identity", torch.empty(0)), self.identity):
            return 0
        done = int(state.pop("batches"))
        statistics.load_state_dict(state)
        return done

    def save(self, statistics: Statistics, batches: int, force: bool = False) -> None:
        """Write, at most every `every_seconds` unless forced."""
        if self.path is None or not (force or time.monotonic() - self._last >= self.every_seconds):
            return
        state = statistics.state_dict() | {"identity": self.identity, "batches": torch.tensor(batches)}
        write_file(self.path, {name: tensor.contiguous() for name, tensor in state.items()})
        self._last = time.monotonic()

    def remove(self) -> None:
        """The fit is done and saved."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
