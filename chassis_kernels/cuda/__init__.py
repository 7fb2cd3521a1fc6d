"""CUDA C++ kernels: one file per op, over the extension `chassis_kernels._CUDA`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from chassis_kernels import backends


@contextlib.contextmanager
def stream_of(device: torch.device) -> Iterator[int]:
    """Makes `device` the current one inside the block and gives its current stream as the integer that kernels take."""
    with torch.cuda.device(device):
        backends._CUDA.set_device(torch.cuda.current_device())
        yield torch.cuda.current_stream().cuda_stream
