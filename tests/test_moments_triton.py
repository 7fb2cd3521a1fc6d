"""moments_update_ in Triton, in the interpreter: against float64 and the C++ kernel's bounds, split rows, tiles, offsets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BUDGET, far_apart
from test_moments import DRAWN, EPS, NAMES, drawn, errors, exact, outlier_rows

from chassis_kernels import Moments, backends, moments_update_

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
module = pytest.importorskip("chassis_kernels.triton.moments")
upper_tile = module.upper_tile

pytestmark = pytest.mark.skipif(
    bool(backends.why_not("moments_update_", "triton", "cpu")), reason="no interpreter to run kernels with"
)


@triton.jit
def decode(out, first, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK).to(tl.int64)
    i, j = upper_tile(first + o)
    tl.store(out + o, i * 100000 + j)


@pytest.fixture(autouse=True)
def in_triton():
    torch.manual_seed(0)
    with backends.use_backend("triton"):
        yield


@pytest.fixture
def many_splits(monkeypatch):
    """Rows are split after 128, which also make a slab."""
    monkeypatch.setattr(module, "PART", 128)
    monkeypatch.setattr(module.SLAB, "value", 128)


@given(
    n=st.one_of(st.integers(0, 40), st.sampled_from([129, 300])),
    **DRAWN,
)
@settings(BUDGET, max_examples=8)
def test_kernel_matches_float64(n, d, t, dtypes, layouts, weighted, full_y, seed):
    x, y, weight = drawn(n, d, t, dtypes, layouts, weighted, seed)
    moments = Moments(d, t, full_y=full_y)
    half = n // 2
    for rows in (slice(0, half), slice(half, n)):
        own = None if weight is None else weight[rows]
        moments_update_(moments, x[rows], None if y is None else y[rows], weight=own)
    truth = exact(x, y, weight, full_y)
    assert not torch.tril(moments.xx, -1).any()
    found = torch.cat([getattr(moments, name).flatten() for name in NAMES])
    assert torch.allclose(found, torch.cat([m.flatten() for m in truth]), rtol=8 * EPS, atol=8 * EPS * (n * 40.0 + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_eager_float32(dtype):
    x = outlier_rows(2048, 64).to(dtype)
    y = torch.randn(2048, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    truth, found = exact(x, y), {}
    for backend in ("triton", "reference"):
        with backends.use_backend(backend):
            found[backend] = errors(moments_update_(Moments(64, 40), x, y), truth)
    for kernel, eager in zip(found["triton"], found["reference"], strict=True):
        assert kernel <= 2 * eager + EPS / 8


@pytest.mark.parametrize("n", [2, 6, 300])
def test_bfloat16_rows_are_centred_and_split_without_rounding(n):
    """What is left is a random walk of float32 sums; without the product of the lower halves the diagonal is 100 EPS off."""
    x = ((torch.randn(n, 70) + torch.linspace(0, 8, 70)) * torch.logspace(-4, 4, 70)).bfloat16()
    y = (torch.randn(n, 9) + 60).bfloat16()
    x[0], y[0] = x[0] * 2, 70.0  # no two rows the same
    found = moments_update_(Moments(70, 9, full_y=True), x, y)
    assert all(error < 2 * EPS * max(1, n**0.5 / 4) for error in errors(found, exact(x, y, None, True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_columns_have_exactly_no_variance(dtype):
    x = torch.tensor([0.0, 0.1, -7.0]).to(dtype).expand(70, 3)
    moments = moments_update_(moments_update_(Moments(3), x), x)
    assert not moments.xx.any() and torch.equal(moments.mean_x, x[0].double())


def test_split_rows_and_slabs_give_the_same_moments(many_splits):
    x, y, weight = torch.randn(300, 70) + 3, torch.randn(300, 9), torch.rand(300).round(decimals=1)
    found = moments_update_(moments_update_(Moments(70, 9, full_y=True), x, y, weight=weight), x, y)
    truth = exact(torch.cat([x, x]), torch.cat([y, y]), torch.cat([weight, torch.ones(300)]), True)
    assert max(errors(found, truth)) < 24 * EPS


@pytest.mark.parametrize("d", [1, 31, 32, 33, 97, 200])
def test_only_the_upper_triangle_is_kept_and_the_gram_is_exactly_symmetric(d, many_splits):
    x = torch.randn(140, d)
    moments = moments_update_(Moments(d), x)
    assert torch.equal(moments.S, moments.S.T) and torch.equal(moments.xx, moments.xx.triu())
    assert max(errors(moments, exact(x))) < 24 * EPS


def test_rows_of_weight_zero_are_never_read():
    x, y = torch.randn(150, 20), torch.randn(150, 9)
    mask = torch.rand(150) > 0.4
    clean = moments_update_(
        Moments(20, 9), torch.where(mask[:, None], x, 0.0), torch.where(mask[:, None], y, 0.0), mask=mask
    )
    dirty = moments_update_(
        Moments(20, 9), torch.where(mask[:, None], x, torch.nan), torch.where(mask[:, None], y, torch.inf), mask=mask
    )
    nothing = moments_update_(Moments(20, 9), x * torch.nan, y, mask=mask & ~mask)
    for name in NAMES:
        assert torch.equal(getattr(clean, name), getattr(dirty, name)), name
        assert not getattr(nothing, name).any()


def test_the_same_call_gives_the_same_bits(many_splits):
    x, y = torch.randn(200, 33).bfloat16(), torch.randn(200, 17).bfloat16()
    one, two = (moments_update_(Moments(33, 17), x, y) for _ in range(2))
    assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in NAMES)


def test_memory_that_was_not_written_is_not_read(many_splits):
    x, y, weight = torch.randn(140, 9), torch.randn(140, 5), torch.rand(140).round(decimals=1)
    clean = moments_update_(Moments(9, 5, full_y=True), x, y, weight=weight)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        found = moments_update_(Moments(9, 5, full_y=True), x, y, weight=weight)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(getattr(found, name), getattr(clean, name)) for name in NAMES)


def test_rows_far_apart_are_reached(int32_overflow_stops):
    """Offsets past 2^31."""
    x = torch.randn(4, 40).bfloat16()
    near, far = (moments_update_(Moments(40), rows) for rows in (x, far_apart(x)))
    assert torch.equal(near.xx, far.xx)


def test_the_tiles_of_a_triangle_are_each_met_once():
    """The column of a tile comes from a square root in float32, which may be one off."""
    for first in (0, 2**20, 2**26):
        out = torch.empty(4096, dtype=torch.int64)
        decode[(1,)](out, first, BLOCK=4096)
        i, j = out // 100000, out % 100000
        assert torch.equal(j * (j + 1) // 2 + i, first + torch.arange(4096)) and (i <= j).all()


def test_opcheck():
    sets = [(*Moments(6, 4)._state.values(), torch.randn(9, 6), torch.randn(9, 4).bfloat16(), torch.rand(9)) for _ in "12"]
    arguments = tuple(list(column) for column in zip(*sets, strict=True))
    torch.library.opcheck(torch.ops.chassis.moments_update_.default, arguments)
