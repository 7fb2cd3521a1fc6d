"""moments_update_: the kernel against the float64 truth, on every layout, dtype, weight and instruction set."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import rerun_on

from benchmarks.timing import peak_bytes
from chassis_kernels import Moments, backends, moments_update_, update_layers

needs_extension = pytest.mark.skipif(backends._C is None, reason="the C++ extension is not built")
NAMES = ("count", "mean_x", "xx", "mean_y", "xy", "yy")
EPS = torch.finfo(torch.float32).eps
BUDGET = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def exact(x, y=None, weight=None, full_y=False):
    """The same numbers in float64, from all rows at once."""
    x = x.double()
    y = x[:, :0] if y is None else y.double()
    weight = torch.ones(len(x), dtype=torch.float64) if weight is None else weight.double()
    x, y, weight = (t[weight != 0] for t in (x, y, weight))
    total = weight.sum()
    mean_x, mean_y = (weight @ t / total if len(t) else torch.zeros(t.shape[1]).double() for t in (x, y))
    x, y = x - mean_x, y - mean_y
    weighted_y = weight[:, None] * y
    yy = (weighted_y.T @ y).triu() if full_y else (weighted_y * y).sum(0)
    return total, mean_x, ((weight[:, None] * x).T @ x).triu(), mean_y, x.T @ weighted_y, yy


def errors(moments, truth):
    """Per moment: the largest error of an entry, in units of its two columns' norms (for means: of value and spread)."""
    norm_x, norm_y = (t.sqrt() + 1e-300 for t in (truth[2].diagonal(), truth[5].diagonal() if moments.full_y else truth[5]))
    spread = truth[0].sqrt() + 1e-300
    unit_yy = torch.outer(norm_y, norm_y) if moments.full_y else norm_y**2
    units = (
        truth[0] + 1e-300, norm_x / spread + truth[1].abs(), torch.outer(norm_x, norm_x),
        norm_y / spread + truth[3].abs(), torch.outer(norm_x, norm_y), unit_yy,
    )  # fmt: skip
    found = (getattr(moments, name) for name in NAMES)
    return [float(((a - b).abs() / u).max()) if b.numel() else 0.0 for a, b, u in zip(found, truth, units, strict=True)]


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.T.contiguous().T,
    "columns of a wider matrix": lambda t: torch.cat([t, t + 1], 1)[:, : t.shape[1]],
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "every other column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "one row expanded": lambda t: t[:1].expand(t.shape),
    "shifted by one element": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}


DRAWN = dict(
    d=st.integers(1, 70),
    t=st.integers(0, 70),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float16])] * 2),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 2),
    weighted=st.booleans(),
    full_y=st.booleans(),
    seed=st.integers(0, 99),
)


def drawn(n, d, t, dtypes, layouts, weighted, seed):
    generator = torch.Generator().manual_seed(seed)
    x = LAYOUTS[layouts[0]]((torch.randn(n, d, generator=generator) + 2).to(dtypes[0]))
    y = LAYOUTS[layouts[1]]((torch.randn(n, t, generator=generator) - 1).to(dtypes[1])) if t else None
    weight = torch.rand(n, generator=generator) * (torch.rand(n, generator=generator) > 0.3) if weighted else None
    return x, y, weight


@needs_extension
@given(
    n=st.one_of(st.integers(0, 40), st.integers(380, 400), st.sampled_from([1000, 1153])),
    **DRAWN,
)
@BUDGET
def test_kernel_matches_float64(n, d, t, dtypes, layouts, weighted, full_y, seed):
    x, y, weight = drawn(n, d, t, dtypes, layouts, weighted, seed)
    moments = Moments(d, t, full_y=full_y)
    with backends.use_backend("cpu"):
        moments_update_(moments, x, y, weight=weight)
    truth = exact(x, y, weight, full_y)
    # Sums of at most 192 float32 products, six such sums to a slab: a few roundings' random walk; centring at mean/std 2
    # adds as much again. A few rows leave columns of almost no variance, for which centring is all there is.
    norms = truth[2].diagonal().sqrt()
    if n > 10 and truth[0] > 5 and float(norms.min()) > 0.3:
        assert max(errors(moments, truth)) < 24 * EPS
    assert not torch.tril(moments.xx, -1).any()
    found = torch.cat([getattr(moments, name).flatten() for name in NAMES])
    scale = n * 40.0 + 1
    assert torch.allclose(found, torch.cat([m.flatten() for m in truth]), rtol=8 * EPS, atol=8 * EPS * scale)


@given(
    n=st.integers(0, 60),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    weighted=st.booleans(),
    full_y=st.booleans(),
    threshold=st.sampled_from([1, 7, 1024]),
)
@BUDGET
def test_any_batch_split_gives_the_same_moments(n, cuts, weighted, full_y, threshold):
    x, y = torch.randn(n, 5).double() * 3 + 100, torch.randn(n, 3).double()
    weight = torch.randint(0, 3, (n,)).double() if weighted else None
    moments = Moments(5, 3, full_y=full_y)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chassis_kernels.rows.PENDING_ROWS", threshold)
        bounds = [0, *sorted(min(cut, n) for cut in cuts), n]
        for start, stop in zip(bounds, bounds[1:], strict=False):
            moments.update(x[start:stop], y[start:stop], weight=None if weight is None else weight[start:stop])
    # float64 throughout: what is lost is eps * (mean / std)^2 of the entries, 1e4 * 2e-16 * n
    for found, truth in zip((getattr(moments, name) for name in NAMES), exact(x, y, weight, full_y), strict=True):
        assert torch.allclose(found, truth, rtol=1e-10, atol=1e-9)
    assert moments.rows == (n if weight is None else int((weight != 0).sum()))


def outlier_rows(n, d=128, seed=0):
    """bf16 rows like a language model's: two columns far from zero."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    x[:, 3] += 60
    x[:, 17] -= 25
    return x.bfloat16()


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_eager_float32(dtype):
    """The largest over several draws: of one, either error may be small by luck."""
    found = {"cpu": [], "reference": []}
    for seed in range(4):
        x = outlier_rows(4096, seed=seed).to(dtype)
        y = torch.randn(4096, 40, generator=torch.Generator().manual_seed(seed + 9)).to(dtype)
        truth = exact(x, y)
        for backend in found:
            with backends.use_backend(backend):
                found[backend].append(errors(moments_update_(Moments(128, 40), x, y), truth))
    for kernel, eager in zip(*(map(max, zip(*of, strict=True)) for of in found.values()), strict=True):
        assert kernel <= 2 * eager + EPS / 8


@needs_extension
def test_error_does_not_grow_with_the_number_of_batches():
    x = outlier_rows(32768, 64)
    truth = exact(x)
    one = Moments(64).update(x)
    many = Moments(64)
    for batch in x.split(50):
        many.update(batch)
    assert errors(many, truth)[2] <= 2 * errors(one, truth)[2]


@needs_extension
@pytest.mark.parametrize("d", [1, 2, 11, 12, 13, 31, 32, 33, 97, 385, 421])
def test_the_gram_is_exactly_symmetric_and_only_its_triangle_is_kept(d):
    x = torch.randn(50, d)
    moments = moments_update_(Moments(d), x)
    assert torch.equal(moments.S, moments.S.T)
    assert torch.equal(moments.xx, moments.xx.triu())
    assert torch.allclose(moments.S, exact(x)[2] + exact(x)[2].triu(1).T, atol=50 * 8 * EPS)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])
def test_rows_of_weight_zero_are_never_read(backend):
    x, y = torch.randn(2100, 20), torch.randn(2100, 9)
    mask = torch.rand(2100) > 0.4
    clean = Moments(20, 9)
    dirty = Moments(20, 9)
    with backends.use_backend(backend):
        moments_update_(clean, x[mask], y[mask])
        moments_update_(dirty, torch.where(mask[:, None], x, torch.nan), y, mask=mask)
    assert dirty.rows == int(mask.sum())
    for name in NAMES:
        assert torch.equal(getattr(clean, name), getattr(dirty, name)), name


@needs_extension
def test_integer_weights_equal_repeated_rows():
    x, y = torch.randn(300, 33), torch.randn(300, 5)
    times = torch.randint(0, 4, (300,))
    weighted = moments_update_(Moments(33, 5), x, y, weight=times)
    truth = exact(x.repeat_interleave(times, 0), y.repeat_interleave(times, 0))
    assert max(errors(weighted, truth)) < 16 * EPS


@needs_extension
def test_constant_columns_have_exactly_no_variance():
    x = torch.full((700, 3), 0.1)
    moments = moments_update_(moments_update_(Moments(3), x), x)
    assert not moments.xx.any()
    assert torch.equal(moments.mean_x, x[0].double())


@needs_extension
@pytest.mark.parametrize("offset", [1e4, -1e6])
def test_a_large_offset_costs_only_what_the_input_rounded_away(offset):
    x = torch.randn(2000, 16) + offset
    assert max(errors(moments_update_(Moments(16), x), exact(x))) < 16 * EPS  # x - fp32(mean) is exact (Sterbenz)


@needs_extension
def test_results_do_not_depend_on_threads_or_repetition():
    x, y = torch.randn(3000, 130), torch.randn(3000, 70)
    threads = torch.get_num_threads()
    states = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            states.append(moments_update_(Moments(130, 70, full_y=True), x, y))
    finally:
        torch.set_num_threads(threads)
    for other in states[1:]:
        assert all(torch.equal(getattr(states[0], name), getattr(other, name)) for name in NAMES)


@needs_extension
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the resident set's high-water mark")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_one_slab_of_packed_rows_however_many_there_are(dtype):
    def peak(n, d, t, convert=lambda rows: rows):
        moments, x, y = Moments(d, t), torch.randn(n, d).to(dtype), torch.randn(n, t).to(dtype)
        return peak_bytes(lambda: moments_update_(moments, convert(x), convert(y)), torch.device("cpu"))

    slab = 1152 * (2 * 256 + 64) * 4  # rows multiplied at a time, x in two layouts
    assert all(slab / 2 < peak(n, 256, 64) < slab + 2**20 for n in (1 << 12, 1 << 16))
    assert peak(1 << 14, 256, 64, lambda rows: rows + 1) > (1 << 14) * (256 + 64) * dtype.itemsize  # copies are counted
    assert peak(2048, 1024, 5120) < (32 + 1) << 20  # where 1152 rows would take more than 32 MiB, fewer are packed


@needs_extension
def test_offsets_beyond_two_to_the_31_elements(tmp_path):
    stride = 2**31 + 5
    file = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * stride, dtype=torch.bfloat16)
    x = file.as_strided((2, 40), (stride, 1))
    x[0], x[1] = torch.randn(40).bfloat16(), torch.randn(40).bfloat16()
    assert max(errors(moments_update_(Moments(40), x), exact(x.clone()))) < 4 * EPS


@needs_extension
@given(
    widths=st.lists(st.integers(1, 50), min_size=1, max_size=7),
    sizes=st.lists(st.sampled_from([0, 3, 40, 700, 1300]), min_size=1, max_size=3),
    t=st.integers(0, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    shared=st.booleans(),
    chosen=st.sampled_from(["all", "mask", "weight", "drop"]),
    full_y=st.booleans(),
)
@BUDGET
def test_layers_together_get_the_bits_of_each_alone(widths, sizes, t, dtype, shared, chosen, full_y):
    together, alone = ([Moments(d, t, full_y=full_y) for d in widths] for _ in range(2))
    for n in sizes:
        xs = [torch.randn(n, d).to(dtype) + 2 for d in widths]
        ys = [torch.randn(n, t).to(dtype) for _ in widths] if t else [None] * len(widths)
        ys = ys[:1] * len(widths) if shared else ys
        options = {}
        if chosen == "mask":
            options["mask"] = torch.rand(n) > 0.3
        elif chosen == "weight":
            options["weight"] = torch.randint(0, 3, (n,))
        elif chosen == "drop" and n:
            options["nan"] = "drop"
            xs[-1][n // 2] = torch.nan
        for one, x, y in zip(alone, xs, ys, strict=True):
            one.update(x, y, **options)
        update_layers(together, xs, ys[0] if shared else ys, **options)
    for a, b in zip(together, alone, strict=True):
        assert (a.rows, a.dropped) == (b.rows, b.dropped)
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in NAMES)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])
def test_the_op_takes_layers(backend):
    x, y, mask = [torch.randn(30, d) for d in (70, 9, 300)], torch.randn(30, 4), torch.rand(30) > 0.3
    with backends.use_backend(backend):
        together = moments_update_([Moments(each.shape[1], 4) for each in x], x, y, mask=mask)
        alone = [moments_update_(Moments(each.shape[1], 4), each, y, mask=mask) for each in x]
    for a, b in zip(together, alone, strict=True):
        assert a.rows == b.rows and all(torch.equal(getattr(a, name), getattr(b, name)) for name in NAMES)


def test_an_error_in_one_layer_changes_none():
    layers = [Moments(3, 2).update(torch.ones(4, 3), torch.ones(4, 2)) for _ in range(2)]
    good, bad, y = torch.ones(5, 3), torch.full((5, 3), torch.nan), torch.ones(5, 2)
    for x, targets, match in (
        ([good, bad], y, "5 of 5 rows"), ([good, good[:, :2]], y, "expected floats of shape"), ([good], y, "2 moments, 1 x"),
        ([good, good], [y], "1 y"), ([good, good[:4]], y, "expected floats of shape"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            update_layers(layers, x, targets)
    with pytest.raises(ValueError, match="distinct moments"):
        update_layers([layers[0]] * 2, [good, good], y)
    assert all(moments.rows == 4 and float(moments.count) == 4 for moments in layers)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])
@pytest.mark.parametrize("full_y", [False, True])
def test_opcheck(backend, full_y):
    with backends.use_backend(backend):
        for y, weight in ((torch.randn(9, 4), torch.rand(9)), (torch.randn(9, 4).bfloat16(), None)):
            sets = [Moments(6, 4, full_y=full_y)._state.values() for _ in range(2)]
            state = [list(column) for column in zip(*sets, strict=True)]
            weights = [] if weight is None else [weight] * 2
            arguments = (*state, [torch.randn(9, 6) for _ in range(2)], [y, y], weights)
            torch.library.opcheck(torch.ops.chassis.moments_update_.default, arguments)
        some = Moments(6)._state
        arguments = ([some["count"]], [some["mean_x"]], [some["xx"]], [], [], [], [torch.randn(9, 6)], [], [])
        torch.library.opcheck(torch.ops.chassis.moments_update_.default, arguments)


@needs_extension
def test_compiles_in_one_graph_with_dynamic_shapes():
    def step(state, x, y):
        torch.ops.chassis.moments_update_(*([tensor] for tensor in state), [x * 2], [y], [])
        return state[0] + 0

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        fast, slow = Moments(6, 4), Moments(6, 4)
        for n in (5, 9, 0, 1):
            x, y = torch.randn(n, 6), torch.randn(n, 4)
            counts = [run(list(m._state.values()), x, y) for run, m in ((compiled, fast), (step, slow))]
            assert torch.equal(*counts)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(getattr(fast, name), getattr(slow, name)) for name in NAMES)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])
def test_autocast_and_gradients_leave_no_trace(backend):
    x, y = torch.randn(20, 6, requires_grad=True), torch.randn(20, 4)
    with backends.use_backend(backend):
        plain = moments_update_(Moments(6, 4), x.detach(), y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            other = moments_update_(Moments(6, 4), x, y)
    assert all(torch.equal(getattr(plain, name), getattr(other, name)) for name in NAMES)
    assert not other.xx.requires_grad


@needs_extension
def test_float64_rows_run_in_float64_and_an_override_says_so():
    x = torch.randn(50, 4).double() + 1e5
    assert max(errors(moments_update_(Moments(4), x), exact(x))) < 1e-10
    with backends.use_backend("cpu"), pytest.raises(backends.BackendError, match="float64"):
        moments_update_(Moments(4), x)


@needs_extension
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set_passes(isa):
    rerun_on(isa, __file__, "matches_float64 or triangle or weight_zero or integer_weights or twice")
