"""delta_logits_ on a few rows of bf16 without a mean: products two at a time where the processor can, exact as in fp32."""

import pytest
import torch
from test_delta_logits import problem, truth

from chassis_kernels import backends, delta_logits, use_backend

pytestmark = pytest.mark.skipif(backends._C is None, reason="the C++ extension is not built")


def narrow(n, d, adapters=None, **options):
    """A problem of bf16 whose logits are fp32, so that nothing hides behind their rounding."""
    dtypes = [torch.float32, *[torch.bfloat16] * 5]
    arguments, named = problem(n, d, 70, 90, 200, adapters, dtypes=dtypes, **options)
    del named["mean"]
    return arguments, named


@pytest.mark.parametrize("adapters", [None, 2])
@pytest.mark.parametrize("d", [2, 130, 766, 767])
@pytest.mark.parametrize("n", [3, 12, 24, 70])
def test_products_are_exact_and_sums_float32(n, d, adapters):
    arguments, options = narrow(n, d, adapters)
    want = truth(arguments, options)
    with use_backend("cpu"):
        out = delta_logits(*arguments, **options)
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("n", [5, 40])
def test_a_row_that_is_not_finite_stays_alone(n):
    arguments, options = narrow(n, 300)
    arguments[1][2, 7], arguments[1][3, 8] = float("nan"), float("inf")
    with use_backend("cpu"):
        out = delta_logits(*arguments, **options)[:, options["cols"]]
    finite = torch.ones(n, dtype=torch.bool)
    finite[2:4] = False
    assert out[finite].isfinite().all() and not out[~finite].isfinite().any()


@pytest.mark.parametrize("n", [5, 40])
def test_results_do_not_depend_on_threads(n):
    arguments, options = narrow(n, 700, repeat=True)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(delta_logits(*arguments, **options))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
