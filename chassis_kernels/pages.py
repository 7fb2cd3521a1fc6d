"""Memory for large results, gradients above all: 2 MiB pages, and freed blocks kept for the next ones.

The kernel zeroes every page that a process first touches, which takes longer than the op that fills it; malloc hands
blocks above 32 MiB back each time they are freed, so that a result of that size would pay on every step.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque
from functools import cache

import torch
from torch import Tensor

LEAST = 4 << 20  # bytes; what is smaller comes from PyTorch's allocator
PAGE = 2 << 20
HEAP = 31 << 20  # bytes; of a larger block glibc learns nothing

_kept: deque[mmap.mmap] = deque(maxlen=3)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """An uninitialised tensor, contiguous. A large one on the CPU has pages of 2 MiB where the system offers them (Linux),
    and its memory stays with the process when it is freed: the three blocks freed last, for tensors of about their size."""
    count = math.prod(shape)
    size = -(-count * dtype.itemsize // PAGE) * PAGE
    if torch.device(device).type != "cpu" or size < LEAST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    block = memoryview(_taken(size) or _made(size))
    weakref.finalize(block, _kept.append, block.obj).atexit = False
    return torch.frombuffer(block, dtype=dtype, count=count).view(shape)


def empty_like(tensor: Tensor) -> Tensor:
    """`empty` of the shape, dtype and device of a tensor."""
    return empty(tensor.shape, tensor.dtype, tensor.device)


@cache
def keep_heap() -> None:
    """Let the process keep smaller blocks that it frees, up to twice HEAP bytes, where malloc is glibc's; once is enough.

    glibc hands the end of its heap back where more of it is free than twice the largest block it has seen freed; a model
    read batch by batch then pays for the pages of its activations in every layer. So it is shown one, never written to.
    """
    torch.empty(HEAP, dtype=torch.uint8)


def release() -> None:
    """Hands the blocks that are kept back to the system."""
    _kept.clear()


def _taken(size: int) -> mmap.mmap | None:
    for _ in range(len(_kept)):
        try:
            block = _kept.popleft()
        except IndexError:  # another thread took it
            return None
        if size <= len(block) <= 2 * size:
            return block
        _kept.append(block)
    return None


def _made(size: int) -> mmap.mmap:
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        block.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a system built without large pages
        pass
    return block
