"""moments_update_ against X.T @ X + X.T @ Y: run `pytest benchmarks/bench_moments.py`; CHASSIS_BENCH_N/_D change the size.

Each case passes a correctness gate in float64 before it is timed. Compare medians within a group.
"""

import os

import pytest
import torch

from chassis_kernels import Moments, moments_update_

pytest.importorskip("pytest_benchmark")
N, D = int(os.environ.get("CHASSIS_BENCH_N", 4096)), int(os.environ.get("CHASSIS_BENCH_D", 2048))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module", params=DTYPES)
def rows(request):
    """x, y [N, D] and, in float64, some rows of the centred products, in units of the columns' norms."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(N, D, generator=generator).to(DTYPES[request.param]) for _ in range(2))
    return request.param, x, y


def eager(x, y):
    x = x.float()
    return x.T @ x, None if y is None else x.T @ y.float()


def gate(moments, x, y):
    """The first columns' products within 8 float32 roundings of float64, in units of the columns' norms."""
    x, first = x.double() - x.double().mean(0), slice(0, 16)
    for found, other in ((moments.S, x), (moments.C, y)):
        if other is not None and found.numel():
            other = other.double() - other.double().mean(0)
            truth = x[:, first].T @ other
            norms = torch.outer(x[:, first].norm(dim=0), other.norm(dim=0))
            assert float(((found[first] - truth) / norms).abs().max()) < 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("way", ["chassis", "eager"])
@pytest.mark.parametrize("targets", ["X and Y", "X alone"])
def test_one_batch(benchmark, rows, targets, way):
    dtype, x, y = rows
    y = y if targets == "X and Y" else None
    benchmark.group = f"{targets}, N={N}, D=T={D}, {dtype}"
    if way == "eager":
        benchmark(eager, x, y)
        return
    moments = Moments(D, 0 if y is None else D)
    gate(moments.update(x, y), x, y)
    benchmark(moments.update, x, y)


@pytest.mark.parametrize("batches", [1, 64])
def test_streaming(benchmark, rows, batches):
    dtype, x, y = rows
    benchmark.group = f"streaming, N={N}, D=T={D}, {dtype}"

    def stream(moments):
        for part in zip(x.chunk(batches), y.chunk(batches), strict=True):
            moments.update(*part)
        return moments.flush()

    gate(stream(Moments(D, D)), x, y)
    benchmark(stream, Moments(D, D))


def test_functional_door(benchmark, rows):
    dtype, x, y = rows
    benchmark.group = f"X and Y, N={N}, D=T={D}, {dtype}"
    benchmark(moments_update_, Moments(D, D), x, y)
