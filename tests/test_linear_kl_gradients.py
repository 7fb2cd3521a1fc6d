"""linear_kl: gradients made in the sweep that makes the KL, against those of a second sweep."""

import pytest
import torch
from support import rerun_on
from test_linear_kl import EPS, INF, needs_extension, problem

from chassis_kernels import Delta, backends, linear_kl, use_backend


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


OPTIONS = [{}, {"softcap_a": 4.0, "scale_a": 0.6}, {"bias_a": torch.randn(300).index_fill_(0, torch.arange(5, 90), -INF)}]


@needs_extension
@pytest.mark.parametrize("n", [1, 97, 400])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("given_b", [False, True])
def test_gradients_made_with_the_kl_are_those_of_a_second_sweep(n, options, given_b):
    heads, delta = problem(n, v=300)
    if given_b:
        heads[2:] = [torch.randn(n, 300), None]
    leaves = [t.requires_grad_() for t in delta]
    kl = linear_kl(*heads, delta=Delta(*leaves), **options)
    together = torch.autograd.grad(kl.sum(), leaves, retain_graph=True)
    with torch.no_grad():
        plain, stats = linear_kl(*heads, delta=Delta(*leaves), stats=True, **options)
    inputs = *heads, options.get("bias_a"), None, *leaves, options.get("softcap_a"), None, options.get("scale_a", 1.0), 1.0
    with torch.no_grad():
        apart = torch.ops.chassis.linear_kl_backward(torch.ones(n), *inputs, stats.lse_a, stats.lse_b)
    assert torch.equal(kl, plain)
    for made, again in zip(together, apart, strict=True):  # one rounds around the running maxima, one around the sums
        torch.testing.assert_close(made, again, rtol=0, atol=8 * EPS * float(again.abs().max()))
    assert all(map(torch.equal, together, torch.autograd.grad(kl.sum(), leaves, retain_graph=True)))
    for factor, grad in zip(together, torch.autograd.grad(kl.mean(), leaves), strict=True):
        torch.testing.assert_close(grad, factor / n, rtol=4 * EPS, atol=0)


@needs_extension
def test_a_second_sweep_only_where_rows_differ_and_v_or_c_ask():
    heads, delta = problem(5)
    calls = {name: backends.OPS[name].calls for name in ("linear_kl", "linear_kl_with_gradients", "linear_kl_backward")}

    def sweeps(reduce, wanted):
        for count in calls.values():
            count.clear()
        leaves = Delta(*(t.clone().requires_grad_(name in wanted) for name, t in zip("uvc", delta, strict=True)))
        loss = reduce(linear_kl(*heads, delta=leaves))
        if loss.requires_grad:
            loss.backward()
        for t in leaves:
            assert (t.grad is not None) == (t.requires_grad and loss.requires_grad)
        return [calls[name].total() for name in calls]

    weight = torch.rand(5)
    assert sweeps(torch.mean, "uvc") == sweeps(torch.sum, "v") == sweeps(lambda kl: -2 * kl.sum(), "c") == [0, 1, 0]
    assert sweeps(lambda kl: kl @ weight, "u") == [0, 1, 0]
    assert sweeps(lambda kl: kl @ weight, "uvc") == sweeps(lambda kl: kl[:4].sum(), "uv") == [0, 1, 1]
    assert sweeps(torch.sum, "") == [1, 0, 0]
    with torch.no_grad():
        assert sweeps(torch.sum, "uvc") == [1, 0, 0]
    with use_backend("reference"):
        assert sweeps(torch.sum, "uvc") == [1, 0, 1]


@needs_extension
@pytest.mark.parametrize("asked", ["u", "v", "c", "uv", "vc"])
@pytest.mark.parametrize("uniform", [False, True])
def test_each_gradient_is_the_same_without_the_others(asked, uniform):
    heads, delta = problem(7)
    weight = torch.ones(7) if uniform else torch.rand(7)
    all_leaves = Delta(*(t.clone().requires_grad_() for t in delta))
    (linear_kl(*heads, delta=all_leaves) @ weight).backward()
    leaves = Delta(*(t.clone().requires_grad_(name in asked) for name, t in zip("uvc", delta, strict=True)))
    (linear_kl(*heads, delta=leaves) @ weight).backward()
    for some, every in zip(leaves, all_leaves, strict=True):
        assert some.grad is None or torch.allclose(some.grad, every.grad, rtol=4 * EPS, atol=EPS)


@needs_extension
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set_passes(isa):
    rerun_on(isa, __file__, "second_sweep")
