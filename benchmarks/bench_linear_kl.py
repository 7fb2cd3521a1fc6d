"""linear_kl against log_softmax of two [N, V] products: run `pytest benchmarks/bench_linear_kl.py`.

`products` are the two products alone as torch does them, the floor of any eager way. Each case passes a gate in float64
before it is timed. Compare medians within a group.
"""

import pytest
import torch
import torch.nn.functional as F

from chassis_kernels import Delta, linear_kl

pytest.importorskip("pytest_benchmark")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = [(2048, 128, 2048), (512, 512, 8192), (512, 768, 32000), (512, 2048, 32000)]
RANK = 32


@pytest.fixture(scope="module", params=[(*shape, dtype) for dtype in DTYPES for shape in SHAPES], ids=str)
def case(request):
    n, d, v, dtype = request.param
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, d), (v, d), (n, d), (v, d), (n, RANK), (RANK, v), (v,))
    scales = (2, d**-0.5, 2, d**-0.5, 0.3, 0.3, 0.1)
    tensors = [torch.randn(shape, generator=generator) * scale for shape, scale in zip(shapes, scales, strict=True)]
    return f"N={n}, D={d}, V={v}, {dtype}", [t.to(DTYPES[dtype]) for t in tensors[:4]], tensors[4:]


def ours(heads, delta=None):
    return linear_kl(*heads, delta=delta)


def eager(heads, delta=None):
    h_a, W_a, h_b, W_b = heads
    a = h_a @ W_a.T if delta is None else h_a @ W_a.T + (delta.u @ delta.v + delta.c).to(h_a.dtype)
    return F.kl_div(a.log_softmax(1), (h_b @ W_b.T).log_softmax(1), log_target=True, reduction="none").sum(1)


def products(heads, delta=None):
    h_a, W_a, h_b, W_b = heads
    return h_a @ W_a.T, h_b @ W_b.T


def gate(heads):
    """The mean error, over 16 rows, is at most twice eager's."""
    h_a, W_a, h_b, W_b = heads
    few = h_a[:16], W_a, h_b[:16], W_b
    want = linear_kl(*(t.double() for t in few))
    error, plain = ((way(few) - want).abs().mean() for way in (ours, eager))
    assert error <= 2 * plain


@pytest.mark.parametrize("way", [ours, eager, products], ids=lambda way: way.__name__)
def test_forward(benchmark, case, way):
    group, heads, _ = case
    benchmark.group = f"linear_kl forward, {group}"
    if way is ours:
        gate(heads)
    benchmark.pedantic(way, (heads,), warmup_rounds=1, rounds=7)


@pytest.mark.parametrize("way", [ours, eager], ids=lambda way: way.__name__)
def test_forward_and_backward(benchmark, case, way):
    group, heads, factors = case
    benchmark.group = f"linear_kl forward and backward, {group}, r={RANK}"
    leaves = Delta(*(t.detach().requires_grad_() for t in factors))
    benchmark.pedantic(lambda: torch.autograd.grad(way(heads, leaves).mean(), leaves), warmup_rounds=1, rounds=5)
