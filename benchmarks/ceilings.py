"""What this machine reaches at best, measured in the run that uses it: matrix products and memory traffic.

A case cannot be faster than max(flops / matmul rate, bytes / copy rate); `share` is that time over the median.
"""

from __future__ import annotations

import functools
import time

import torch

REPEATS = 5


@functools.cache
def ceilings(device: str) -> dict[str, float]:
    """{matmul_fp32, matmul_bf16: operations a second; copy, read: bytes a second}, each the best of five runs.

    `matmul_fp32` is torch's default float32 product (on CUDA without TF32).
    """
    large = device == "cuda"
    size, elements = (8192, 1 << 28) if large else (1536, 1 << 26)
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        found[f"matmul_{name}"] = 2 * size**3 / _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2 * source.nbytes / _best(lambda: target.copy_(source), device)
    found["read"] = source.nbytes / _best(source.sum, device)
    return found


def bound(flops: float, size: float, dtype: str, rates: dict[str, float]) -> tuple[str, float]:
    """The ceiling that binds, by name, and the milliseconds it allows at best."""
    limits = {f"matmul_{dtype}": flops / rates[f"matmul_{dtype}"], "copy": size / rates["copy"]}
    name = max(limits, key=limits.get)
    return name, 1e3 * limits[name]


def _best(step, device: str) -> float:
    step()
    times = []
    for _ in range(REPEATS):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)
