"""How long a step takes and how much memory it needs, for several providers that take turns.

Within a round every provider runs once, in an order that rotates, so that a busy machine slows all of them; ratios are
formed within rounds. Consecutive calls use different copies of the inputs, together three times the last cache level.

Memory, `peak_bytes`, is what a step adds to what was there before it, its results included. On CUDA: PyTorch's allocator.
On CPU the larger of two counts, each of which misses something: bytes of tensor storage alive at once, seen by a dispatch
mode (not buffers the C++ kernels or BLAS allocate themselves), and growth of the resident set's high-water mark (Linux
only; not pages that a library had kept from an earlier call). Buffers made once and reused are not a step's.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
import weakref
from collections.abc import Callable
from itertools import cycle

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chassis_kernels import pages

SHORTEST = 0.005  # seconds of a timed run
CPU_CACHE = 32 << 20  # bytes, a generous last cache level
COPIES = 16  # at most
COPY_BYTES = 1 << 30  # at most, in all copies together


def copies_of(inputs: tuple, device: torch.device) -> list[tuple]:
    """The inputs and as many copies as make three times the cache, within COPIES and COPY_BYTES."""
    size = sum(t.nbytes for t in tree_leaves(inputs) if isinstance(t, torch.Tensor))
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_CACHE
    number = max(1, min(COPIES, -(-3 * cache // max(size, 1)), COPY_BYTES // max(size, 1)))
    return [inputs] + [clone(inputs) for _ in range(number - 1)]


def clone(inputs: tuple) -> tuple:
    """Independent tensors with the same values; what is no tensor is shared."""
    return tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in inputs)


def rounds_of(steps: dict[str, list[Callable]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds per call of every provider in every round; `steps` are its calls on each copy of the inputs."""
    turns, calls = {name: cycle(each) for name, each in steps.items()}, {}
    for name, turn in turns.items():
        _clocked(turn, 1, device)
        calls[name] = max(1, round(1e3 * SHORTEST / max(_clocked(turn, 1, device), 1e-3)))
        _clocked(turn, calls[name], device)
    names, times = list(steps), {name: [] for name in steps}
    for number in range(rounds):
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            times[name].append(_clocked(turns[name], calls[name], device))
    return times


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return statistics.median(values), fifths[0], fifths[3]


def ratios(eager: list[float], other: list[float]) -> list[float]:
    """How many times as fast as eager, round by round."""
    return [a / b for a, b in zip(eager, other, strict=True)]


def peak_bytes(step: Callable, device: torch.device) -> int:
    """Memory one call adds at its peak (see above), after a call that warmed it up."""
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    try:
        with LiveBytes() as live:
            step()
        tracked = live.peak
    except Exception:  # compiled code does not run under every dispatch mode: the resident set remains
        tracked = 0
    return max(tracked, _resident_growth(step))


class LiveBytes(TorchDispatchMode):
    """`peak`: most bytes of tensor storage made inside the block that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.known.update(t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if self._counts(t))
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if self._counts(tensor):
                self._add(tensor.untyped_storage())
        return out

    @staticmethod
    def _counts(value) -> bool:
        return isinstance(value, torch.Tensor) and value.layout == torch.strided

    def _add(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def _clocked(turn, calls: int, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            next(turn)()
        return 1e3 * (time.perf_counter() - started) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        next(turn)()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / calls


def _resident_growth(step: Callable) -> int:
    try:
        pages.release()  # else the step reuses freed pages that still count as resident
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets the high-water mark to the present
        before = _status("VmRSS")
        step()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError):
        return 0


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name + ":"))
