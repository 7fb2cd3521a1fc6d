"""What only the Triton kernels of delta_logits must show, in the interpreter: offsets, tiles, columns named across tiles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BUDGET, far_apart
from test_delta_logits import DTYPES, problem, truth
from torch.utils._python_dispatch import TorchDispatchMode

from chassis_kernels import backends, delta_logits, delta_logits_, use_backend

pytestmark = pytest.mark.skipif(
    bool(backends.why_not("delta_logits", "triton", "cpu")), reason="no interpreter to run kernels with"
)


@given(
    n=st.integers(0, 40),
    d=st.integers(0, 70),
    r=st.integers(0, 40),
    columns=st.tuples(st.integers(1, 60), st.integers(0, 50), st.booleans(), st.booleans()),
    adapters=st.sampled_from([None, 1, 3]),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    seed=st.integers(0, 99),
)
@settings(BUDGET, max_examples=20)
def test_kernel_matches_float64(n, d, r, columns, adapters, dtypes, seed):
    v, k, cols, repeat = columns
    arguments, options = problem(n, d, r, k if repeat else min(k, v), v, adapters, None, dtypes, repeat, cols, seed)
    want = truth(arguments, options)
    with use_backend("triton"):
        out = delta_logits(*arguments, **options)
    # as for the C++ kernel: fp32 sums, then one rounding to the logits' dtype
    eps = torch.finfo(torch.float32).eps
    size = want.abs().max() + 4 if want.numel() else 0
    assert torch.all((out - want).abs() <= torch.finfo(out.dtype).eps * want.abs() + 16 * eps * size)


def test_a_column_named_in_several_tiles_gets_all_changes_and_one_rounding():
    logits = torch.ones(3, 40).bfloat16()
    tiny = torch.full((1, 70), 2.0**-13)  # nothing to a bfloat16 at 1, and 64 of them are a digit
    cols = torch.arange(70) % 64
    cols[::2] = 5
    with use_backend("triton"):
        delta_logits_(logits, torch.ones(3, 1), torch.ones(1, 1), tiny, cols=cols % 40)
    named = (cols % 40)[:, None] == torch.arange(40)
    assert torch.equal(logits[0], (1 + named.sum(0) * 2.0**-13).bfloat16())
    assert torch.equal(logits, logits[:1].expand(3, -1))


def test_rows_far_apart_are_reached(int32_overflow_stops):
    """Offsets past 2^31."""
    arguments, options = problem(n=4, dtype=torch.bfloat16)
    logits, hidden, *rest = arguments
    with use_backend("triton"):
        found = delta_logits_(far_apart(logits), far_apart(hidden), *rest, **options)
        assert torch.equal(found, delta_logits_(logits, hidden, *rest, **options))


def test_ids_out_of_range_are_passed_over():
    (logits, hidden, U, V, bias), options = problem(adapters=2)
    before = logits.clone()
    options |= {"cols": torch.tensor([0, 1, 2, 3, 4, 5, 6, -1, 50]), "adapter_id": torch.tensor([0, 2, -2, 1, 9])}
    with use_backend("triton"):
        delta_logits_(logits, hidden, U, V, bias, **options)
    changed = logits != before
    assert changed[[0, 3], :7].all() and not changed[:, 7:].any() and not changed[[1, 2, 4]].any()


class NothingRuns(TorchDispatchMode):
    """Raises where torch does more than give out memory or look at it in another shape."""

    FREE = ("chassis::delta_logits_", "aten::new_empty", "aten::unsqueeze", "aten::view")

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op.name().split(".")[0] in self.FREE, op.name()
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("adapters", [None, 3])
@pytest.mark.parametrize("cols", [True, False])
@pytest.mark.parametrize("n", [1, 40])
def test_a_call_is_two_launches_and_nothing_else(n, adapters, cols, monkeypatch):
    """On a GPU all that would stand beside them is an allocation; so nothing waits for the device either."""
    from chassis_kernels.triton import shared

    arguments, options = problem(n, adapters=adapters, cols=cols)
    want, launched, run = truth(arguments, options), [], shared.run

    def count(op, kernel, *rest):
        launched.append(kernel.__name__)
        with torch.utils._python_dispatch._disable_current_modes():  # the interpreter works with torch itself
            run(op, kernel, *rest)

    monkeypatch.setattr(shared, "run", count)
    with use_backend("triton"), NothingRuns():
        delta_logits_(*arguments, **options)
    assert launched == ["down", "up"]
    torch.testing.assert_close(arguments[0].double(), want, rtol=1e-5, atol=1e-5)
