"""delta_logits_ against what one writes without it: run `pytest benchmarks/bench_delta_logits.py`.

D=2048, r=128, K=2048, V=32000 (CHASSIS_BENCH_D, _R, _K, _V change them), N rows from one to 2048. `clone` is
`out = logits.clone(); out.index_add_(1, cols, h @ U @ V)`, `in place` skips the clone. Each case passes a gate in float64
before it is timed. Compare medians within a group.
"""

import os

import pytest
import torch

from chassis_kernels import delta_logits_

pytest.importorskip("pytest_benchmark")
D, R, K, VOCABULARY = (
    int(os.environ.get(f"CHASSIS_BENCH_{name}", size)) for name, size in (("D", 2048), ("R", 128), ("K", 2048), ("V", 32000))
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module", params=[(n, dtype) for dtype in DTYPES for n in (1, 16, 64, 2048)], ids=str)
def case(request):
    n, dtype = request.param
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, VOCABULARY), (n, D), (D, R), (R, K))
    scales = (1, 1, D**-0.5, R**-0.5)
    tensors = [
        (torch.randn(shape, generator=generator) * scale).to(DTYPES[dtype])
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    return f"delta_logits_, N={n}, D={D}, r={R}, K={K}, V={VOCABULARY}, {dtype}", *tensors, pick(VOCABULARY, K, generator)


def pick(vocabulary, k, generator):
    return torch.randperm(vocabulary, generator=generator)[:k].sort().values


def ours(logits, hidden, U, V, cols):
    return delta_logits_(logits, hidden, U, V, cols=cols)


def clone(logits, hidden, U, V, cols):
    return logits.clone().index_add_(1, cols, hidden @ U @ V)


def in_place(logits, hidden, U, V, cols):
    return logits.index_add_(1, cols, hidden @ U @ V)


def in_place_indexed(logits, hidden, U, V, cols):
    logits[:, cols] += hidden @ U @ V
    return logits


def gate(logits, hidden, U, V, cols):
    """The largest error, over 64 rows, is at most twice eager's."""
    logits, hidden = logits[:64], hidden[:64]
    want = clone(logits.double(), hidden.double(), U.double(), V.double(), cols)
    error, plain = ((way(logits.clone(), hidden, U, V, cols) - want).abs().max() for way in (ours, clone))
    assert error <= 2 * plain


@pytest.mark.parametrize("way", [ours, clone, in_place, in_place_indexed], ids=lambda way: way.__name__)
def test_one_call(benchmark, case, way):
    benchmark.group, *arguments = case
    if way is ours:
        gate(*arguments)
    benchmark(way, *arguments)


@pytest.mark.parametrize("adapters", [1, 8])
def test_64_rows_with_several_adapters(benchmark, adapters):
    generator = torch.Generator().manual_seed(0)
    benchmark.group = f"delta_logits_, 64 rows, D={D}, r={R}, K={K}, V={VOCABULARY}, fp32"
    logits, hidden = torch.randn(64, VOCABULARY, generator=generator), torch.randn(64, D, generator=generator)
    U = torch.randn(adapters, D, R, generator=generator) * D**-0.5
    V = torch.randn(adapters, R, K, generator=generator) * R**-0.5
    ids, cols = torch.arange(64) % adapters, pick(VOCABULARY, K, generator)
    benchmark(delta_logits_, logits, hidden, U, V, cols=cols, adapter_id=ids)
