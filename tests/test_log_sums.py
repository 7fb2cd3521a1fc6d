"""log_sums: every backend against log Σ exp in float64, and what it makes of infinities, NaN and empty rows."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import LAYOUTS, backends_of, each_backend_of, far_apart, rerun_on

from chassis_kernels import backends, log_sums

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
backend = each_backend_of("log_sums")
needs_extension = pytest.mark.skipif("cpu" not in backends_of("log_sums"), reason="no C++ implementation")


def check(z, temperature=1.0):
    """Within four roundings of float32, relative to 1 + |value|."""
    found, right = log_sums(z, temperature), torch.logsumexp(z.double() / temperature, 1)
    assert found.dtype == torch.float32 and found.shape == right.shape
    where = right.isfinite()
    assert torch.equal(found[~where], right[~where].float())
    error = (found.double() - right)[where].abs() / (1 + right[where].abs())
    assert not len(error) or error.max() <= 4 * torch.finfo(torch.float32).eps
    return found


@pytest.mark.parametrize("name", backends_of("log_sums"))
@given(
    n=st.integers(0, 9),
    v=st.integers(0, 200),
    scale=st.sampled_from([0.01, 3.0, 40.0]),
    offset=st.sampled_from([0.0, 1e3, -1e3]),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_values(name, n, v, scale, offset, temperature, dtype, layout, seed):
    z = scale * torch.randn(n, v, generator=torch.Generator().manual_seed(seed)) + offset
    with backends.use_backend(name):
        check(LAYOUTS[layout](z.to(dtype)) if n else z.to(dtype), temperature)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("v", [2048, 50257, 300_001])
def test_wide_rows(v, dtype, backend):
    check((3 * torch.randn(3, v, generator=torch.Generator().manual_seed(0))).to(dtype))


def test_equal_logits_give_the_logarithm_of_their_number(backend):
    assert (check(torch.full((2, 1 << 20), 7.0)) - 7 - 20 * torch.log(torch.tensor(2.0))).abs().max() <= 4e-6


def test_infinities_and_nan(backend):
    z = torch.randn(6, 37, generator=torch.Generator().manual_seed(0))
    z[0], z[1, ::2], z[2, 36] = -torch.inf, -torch.inf, torch.inf
    z[3] = torch.finfo(torch.float32).min
    check(z)
    z[4, 5], z[5] = torch.nan, torch.nan
    assert log_sums(z).isnan().tolist() == [False] * 4 + [True] * 2


def test_empty_inputs(backend):
    assert log_sums(torch.empty(0, 5)).shape == (0,) and (log_sums(torch.empty(3, 0)) == -torch.inf).all()


@needs_extension
def test_threads_do_not_change_a_bit():
    z, before, found = torch.randn(70, 900), torch.get_num_threads(), []
    with backends.use_backend("cpu"):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(log_sums(z))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_extension
def test_rows_far_apart_are_reached():
    """Offsets past 2^31."""
    z = torch.randn(5, 40)
    assert torch.equal(log_sums(far_apart(z)), log_sums(z))


def test_autocast_rounds_nothing(backend):
    z = torch.randn(4, 50)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(log_sums(z), log_sums(z.clone())) and log_sums(z).dtype == torch.float32


def test_float64_stays():
    z = torch.randn(130, 50, dtype=torch.float64)
    assert torch.equal(log_sums(z), z.logsumexp(1))


def test_opcheck(backend):
    torch.library.opcheck(torch.ops.chassis.log_sums.default, backends.OPS["log_sums"].example("cpu"))


def test_compiled_without_graph_breaks(backend):
    torch._dynamo.reset()
    step = torch.compile(lambda z: log_sums(z, 1.5), backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 3):
        z = torch.randn(rows, 21)
        assert torch.equal(step(z), log_sums(z, 1.5))


def test_a_gradient_is_refused(backend):
    with pytest.raises(RuntimeError, match="no gradient: detach"):
        log_sums(torch.randn(3, 4, requires_grad=True)).sum().backward()


@needs_extension
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set(isa):
    rerun_on(isa, __file__, "cpu and (values or wide or infinities or empty or equal)")


@pytest.mark.parametrize(
    ("logits", "temperature", "message"),
    [
        (torch.zeros(3), 1.0, r"\(3,\): expected floats \[N, V\]"),
        (torch.zeros(3, 4).long(), 1.0, "torch.int64"),
        (torch.zeros(3, 4), 0.0, "temperature is 0.0"),
        (torch.zeros(3, 4), float("nan"), "temperature is nan"),
    ],
)
def test_what_does_not_fit_is_refused(logits, temperature, message):
    with pytest.raises(ValueError, match=message):
        log_sums(logits, temperature)
