"""linear_kl's Triton kernels beyond what test_linear_kl.py asks of every backend: far rows, blocks and tiles."""

import pytest
import torch
from hypothesis import given, settings
from support import far_apart
from test_linear_kl import BUDGET, DRAWN, DTYPES, KERNELS, check_drawn, problem, truth

from chassis_kernels import Delta, linear_kl, use_backend

pytestmark = pytest.mark.skipif("triton" not in KERNELS, reason="no interpreter for Triton kernels")


@given(drawn=DRAWN)
@settings(BUDGET, max_examples=8)
def test_interpreted_kernel_matches_float64(drawn):
    check_drawn("triton", **drawn)


def test_logits_far_apart_are_reached(int32_overflow_stops):
    heads, delta = problem(4, v=60, dtype=torch.bfloat16)
    logits = torch.randn(4, 60).bfloat16()
    leaves = [t.requires_grad_() for t in delta]
    with use_backend("triton"):
        near, far = (linear_kl(*heads[:2], b, None, delta=Delta(*leaves)) for b in (logits, far_apart(logits)))
    assert torch.equal(near, far)
    assert all(map(torch.equal, *(torch.autograd.grad(kl.sum(), leaves) for kl in (near, far))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_blocks_of_rows_and_tiles_of_columns(dtype, monkeypatch):
    from chassis_kernels.triton import linear_kl as kernels
    from chassis_kernels.triton import products

    monkeypatch.setattr(kernels, "ROWS", 4)
    monkeypatch.setattr(products, "TILE", 7)
    heads, delta = problem(9, 16, 20, 1100, dtype=dtype, delta_dtype=torch.bfloat16)
    leaves, right = ([convert(t).detach().requires_grad_() for t in delta] for convert in (torch.clone, torch.Tensor.double))
    with use_backend("triton"):
        kl = linear_kl(*heads, delta=Delta(*leaves))
        grads = torch.autograd.grad(kl.sum(), leaves)
    want = truth(heads, delta=Delta(*right))
    torch.testing.assert_close(kl.double(), want, rtol=1e-5, atol=1e-5)
    for found, grad in zip(grads, torch.autograd.grad(want.sum(), right), strict=True):
        assert (found - grad).norm() <= torch.finfo(torch.bfloat16).eps * grad.norm()
