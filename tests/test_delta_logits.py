"""delta_logits_ and delta_logits: kernel and reference against the float64 truth, values and gradients."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import backends_of, rerun_on

from chassis_kernels import BackendError, backends, delta_logits, delta_logits_, use_backend

needs_extension = pytest.mark.skipif(backends._C is None, reason="the C++ extension is not built")
every_backend = pytest.mark.parametrize("backend", backends_of("delta_logits_"))
those_that_check = pytest.mark.parametrize("backend", [b for b in backends_of("delta_logits_") if b != "triton"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BUDGET = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(-1, 0).contiguous().transpose(-1, 0),
    "columns of a wider matrix": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "every other column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def problem(n=5, d=40, r=6, k=9, v=50, adapters=None, dtype=torch.float32, dtypes=None, repeat=False, cols=True, seed=0):
    """Arguments of delta_logits_: unit-scale logits and a change of unit scale."""
    generator = torch.Generator().manual_seed(seed)
    stack = () if adapters is None else (adapters,)
    k = k if cols else v
    shapes = [(n, v), (n, d), (*stack, d, r), (*stack, r, k), (*stack, k), (*stack, d)]
    scales = [1, 1, max(d, 1) ** -0.5, max(r, 1) ** -0.5, 1, 1]
    logits, hidden, U, V, bias, mean = (
        (torch.randn(shape, generator=generator) * scale).to(own)
        for shape, scale, own in zip(shapes, scales, dtypes or [dtype] * 6, strict=True)
    )
    options = {"mean": mean}
    if cols:
        options["cols"] = (
            torch.randint(v, (k,), generator=generator) if repeat else torch.randperm(v, generator=generator)[:k]
        )
    if adapters is not None:
        options["adapter_id"] = torch.randint(-1, adapters, (n,), generator=generator)
    return (logits, hidden, U, V, bias), options


def cast(arguments, options, convert):
    change = lambda t: convert(t) if t.is_floating_point() else t  # noqa: E731
    return tuple(map(change, arguments)), {name: change(t) for name, t in options.items()}


def truth(arguments, options):
    arguments, options = cast(arguments, options, torch.Tensor.double)
    with use_backend("reference"):
        return delta_logits(*arguments, **options)


def eager(arguments, options):
    """What one writes without this op, in the inputs' own dtype; with adapters, one of them after the other."""
    (out, hidden, U, V, bias), out_cols = arguments, options.get("cols")
    out = out.clone()
    ids = options.get("adapter_id", torch.zeros(len(out), dtype=torch.int64))
    stacked = [t if U.dim() == 3 else t[None] for t in (U, V, bias, options["mean"])]
    cols = torch.arange(out.shape[1]) if out_cols is None else out_cols
    for a, (u, v, c, m) in enumerate(zip(*stacked, strict=True)):
        rows = (ids == a).nonzero().squeeze(1)
        out[rows] = out[rows].index_add(1, cols, (hidden[rows] - m) @ u @ v + c)
    return out


@needs_extension
@given(
    n=st.one_of(st.integers(0, 30), st.sampled_from([64, 127, 130, 200])),
    d=st.one_of(st.integers(0, 70), st.sampled_from([384, 385, 800])),
    r=st.one_of(st.integers(0, 40), st.sampled_from([128, 390])),
    columns=st.tuples(st.integers(1, 700), st.integers(0, 500), st.booleans(), st.booleans()),
    adapters=st.sampled_from([None, 1, 3]),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=5, max_size=5),
    seed=st.integers(0, 99),
)
@BUDGET
def test_kernel_matches_float64(n, d, r, columns, adapters, dtypes, layouts, seed):
    v, k, cols, repeat = columns
    arguments, options = problem(n, d, r, k if repeat else min(k, v), v, adapters, None, dtypes, repeat, cols, seed)
    want = truth(arguments, options)
    arguments = tuple(LAYOUTS[name](t) if t.numel() else t for name, t in zip(layouts, arguments, strict=True))
    with use_backend("cpu"):
        out = delta_logits_(*arguments, **options)
    assert out is arguments[0]
    # fp32 sums of d and r terms in runs of 64, then one rounding to the logits' dtype
    eps = torch.finfo(torch.float32).eps
    size = want.abs().max() + 4 if want.numel() else 0
    assert torch.all((out - want).abs() <= torch.finfo(out.dtype).eps * want.abs() + 16 * eps * size)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "adapters"), [(1, None), (16, 3), (150, None)])
def test_error_is_at_most_twice_that_of_eager(n, adapters, dtype):
    arguments, options = problem(n, 768, 64, 100, 400, adapters, dtype)
    want = truth(arguments, options)
    with use_backend("cpu"):
        error = (delta_logits(*arguments, **options) - want).abs()
    plain = (eager(arguments, options) - want).abs()
    assert error.max() <= 2 * plain.max()
    assert error.mean() <= 2 * plain.mean()


@every_backend
def test_one_row_of_hidden_states_and_one_mean_and_factor_expanded(backend):
    (logits, hidden, U, *rest), options = problem(adapters=3)
    options["mean"], U = options["mean"][:1].expand_as(options["mean"]), U[:1].expand_as(U)
    arguments = logits, hidden[:1].expand_as(hidden), U, *rest
    with use_backend(backend):
        found = delta_logits(*arguments, **options)
        arguments, options = cast(arguments, options, torch.Tensor.contiguous)
        assert torch.equal(found, delta_logits(*arguments, **options))
    torch.testing.assert_close(found.double(), truth(arguments, options), rtol=1e-5, atol=1e-5)


@every_backend
def test_error_does_not_grow_with_the_width_of_the_sum(backend):
    errors = []
    for d in (256, 8192):
        arguments, options = problem(4, d, 32, 64, 64, cols=False)
        with use_backend(backend):
            errors.append((delta_logits(*arguments, **options) - truth(arguments, options)).abs().mean())
    assert errors[1] <= 2 * errors[0]


@every_backend
def test_hidden_minus_mean_is_formed_before_anything_is_rounded(backend):
    arguments, options = problem(d=64, dtype=torch.bfloat16)
    options["mean"] = options["mean"].float() + 300
    arguments[1].add_(300)
    with use_backend(backend):
        error = (delta_logits(*arguments, **options) - truth(arguments, options)).abs().max()
    assert error <= torch.finfo(torch.bfloat16).eps * 8  # one rounding of logits below 8


@every_backend
@pytest.mark.parametrize("n", [3, 140])
def test_repeated_columns_accumulate_with_one_rounding(backend, n):
    logits = torch.ones(n, 4).bfloat16()
    tiny = torch.full((1, 8), 2.0**-10)  # an eighth of the last digit of bf16 at 1: alone it rounds to nothing
    with use_backend(backend):
        delta_logits_(logits, torch.ones(n, 1), torch.ones(1, 1), tiny, cols=torch.tensor([2, 0, 2, 2, 2, 2, 2, 2]))
    assert (logits == torch.tensor([1, 1, 1 + 2.0**-7, 1])).all()


@every_backend
@pytest.mark.parametrize("n", [6, 150])
def test_rows_and_columns_that_are_not_named_keep_their_bits(backend, n):
    arguments, options = problem(n, adapters=2, dtype=torch.bfloat16)
    logits = arguments[0]
    logits[:, ::2] = torch.tensor(-0.0)
    logits[0, 1], logits[1, 3] = torch.nan, -torch.inf
    before = logits.clone()
    with use_backend(backend):
        delta_logits_(*arguments, **options)
    kept = torch.ones_like(logits, dtype=torch.bool)
    kept[:, options["cols"]] = False
    kept[options["adapter_id"] == -1] = True
    assert torch.equal(logits.view(torch.int16)[kept], before.view(torch.int16)[kept])
    assert torch.equal(logits.isnan(), before.isnan())


@every_backend
@pytest.mark.parametrize("n", [7, 260])
def test_an_adapter_per_row_equals_a_call_per_adapter(backend, n):
    (logits, hidden, U, V, bias), options = problem(n, adapters=3)
    ids = options.pop("adapter_id")
    with use_backend(backend):
        together = delta_logits(logits, hidden, U, V, bias, **options, adapter_id=ids)
        for a in range(3):
            mean = options["mean"][a]
            alone = delta_logits(logits, hidden, U[a], V[a], bias[a], mean=mean, cols=options["cols"])
            assert torch.allclose(together[ids == a], alone[ids == a], atol=1e-5)
    assert torch.equal(together[ids == -1], logits[ids == -1])


@every_backend
@pytest.mark.parametrize("empty", ["n", "k", "r", "d", "v"])
def test_empty_inputs_are_defined(backend, empty):
    sizes = {"n": 3, "d": 4, "r": 2, "k": 5, "v": 8} | {empty: 0}
    if empty == "v":
        sizes["k"] = 0
    arguments, options = problem(**sizes)
    leaves = [t.requires_grad_() for t in arguments]
    with use_backend(backend):
        out = delta_logits(*leaves, **options)
        out.sum().backward()
    assert torch.allclose(out, truth(arguments, options).float(), atol=1e-5)
    assert all(t.grad.shape == t.shape and t.grad.isfinite().all() for t in leaves)


@those_that_check
@pytest.mark.parametrize(("name", "bad"), [("cols", 50), ("cols", -1), ("adapter_id", 3), ("adapter_id", -2)])
def test_an_id_out_of_range_raises_and_nothing_is_written(backend, name, bad):
    arguments, options = problem(adapters=3)
    options[name][2] = bad
    before = arguments[0].clone()
    with use_backend(backend), pytest.raises(IndexError, match=f"{name} holds {bad}: expected ids from"):
        delta_logits_(*arguments, **options)
    assert torch.equal(arguments[0], before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 40)}, r"hidden has shape \(4, 40\), expected \(5, 40\)"),
        ({"V": torch.zeros(7, 9)}, r"V has shape \(7, 9\), expected \(6, 9\)"),
        ({"bias": torch.zeros(8)}, r"bias has shape \(8,\), expected \(9,\)"),
        ({"mean": torch.zeros(1, 40)}, "mean has shape"),
        ({"cols": None}, "V has 9 columns and the logits 50"),
        ({"cols": torch.zeros(9, dtype=torch.int32)}, "cols must be int64"),
        ({"adapter_id": torch.zeros(5, dtype=torch.int64)}, "needs stacked adapters"),
        ({"U": torch.zeros(2, 40, 6)}, "must both be 2-D, or both 3-D"),
        ({"U": torch.zeros(2, 40, 6), "V": torch.zeros(2, 6, 9), "bias": None, "mean": None}, "2 adapters need adapter_id"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    arguments, options = problem()
    everything = dict(zip(("logits", "hidden", "U", "V", "bias"), arguments, strict=True)) | options | change
    with pytest.raises(ValueError, match=message):
        delta_logits_(**everything)


@every_backend
def test_leading_dimensions_and_views_of_logits(backend):
    arguments, options = problem(n=12, adapters=2)
    logits, hidden, *rest = arguments
    with use_backend(backend):
        want = delta_logits(*arguments, **options)
        wide = torch.full((3, 6, 100), 7.0)
        for view in (wide[:, 1:5, :50], wide[:, 2:3, 50:], wide[0, 0, :50]):
            n = view[..., 0].numel()
            view.copy_(logits[:n].view(view.shape))
            options["adapter_id"] = options["adapter_id"][:n]
            delta_logits_(view, hidden[:n].view(*view.shape[:-1], -1), *rest, **options)
            assert torch.equal(view.reshape(n, 50), want[:n])
    assert (wide[:, 5] == 7).all()


def test_logits_whose_rows_share_memory_are_refused():
    arguments, options = problem()
    with pytest.raises(RuntimeError, match="rows share memory"):
        delta_logits_(torch.zeros(1, 50).expand(5, 50), *arguments[1:], **options)


@needs_extension
def test_offsets_beyond_two_to_the_31_elements(tmp_path):
    stride = 2**31 + 5
    file = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * stride, dtype=torch.bfloat16)
    arguments, options = problem(n=2, dtype=torch.bfloat16)
    far = file.as_strided((2, 50), (stride, 1)).copy_(arguments[0])
    assert torch.equal(delta_logits_(far, *arguments[1:], **options), delta_logits_(*arguments, **options))


@needs_extension
@pytest.mark.parametrize("n", [1, 5, 40, 200])
def test_results_do_not_depend_on_threads_or_repetition(n):
    arguments, options = problem(n, 700, 130, 300, 400, repeat=True)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            found.append(delta_logits(*arguments, **options))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("adapters", [None, 3])
@pytest.mark.parametrize("cols", [True, False])
def test_gradcheck(adapters, cols):
    arguments, options = cast(*problem(3, 4, 2, 5, 6, adapters, repeat=True, cols=cols), torch.Tensor.double)
    mean = options.pop("mean")
    leaves = [t.requires_grad_() for t in (*arguments, mean)]
    assert torch.autograd.gradcheck(lambda *t: delta_logits(*t[:5], mean=t[5], **options), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: delta_logits(*t[:5], mean=t[5], **options), leaves)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_with_a_producer_upstream_and_twice(backend, dtype):
    arguments, options = problem(adapters=2, repeat=True, dtype=dtype)
    weight = torch.randn(5, 50)

    def gradients(convert):
        given, chosen = cast(arguments, options, lambda t: convert(t).detach().requires_grad_())
        leaves = [*given, chosen["mean"]]
        logits, hidden, *rest = given
        loss = (delta_logits(logits.exp(), hidden.tanh(), *rest, **chosen) * weight).sum()
        once = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert all(map(torch.equal, once, torch.autograd.grad(loss, leaves)))
        return once

    with use_backend(backend):
        found = gradients(lambda t: t)
    for grad, want in zip(found, gradients(torch.Tensor.double), strict=True):
        # tanh(hidden) and the gradients are rounded to the dtype, the sums over 5 rows or 9 columns are not
        assert (grad - want).abs().max() <= 8 * torch.finfo(dtype).eps * want.abs().max()


def test_only_what_requires_grad_gets_one():
    arguments, options = problem()
    arguments[3].requires_grad_()
    delta_logits(*arguments, **options).sum().backward()
    assert [t.grad is not None for t in arguments] == [False, False, False, True, False]
    with torch.no_grad():
        assert not delta_logits(*arguments, **options).requires_grad


def test_in_place_where_a_gradient_is_needed_names_the_twin():
    arguments, options = problem()
    arguments[2].requires_grad_()
    with pytest.raises(RuntimeError, match="U require grad: call delta_logits"):
        delta_logits_(*arguments, **options)
    with torch.no_grad():
        delta_logits_(*arguments, **options)


@every_backend
def test_backward_notices_that_a_saved_tensor_was_changed_in_place(backend):
    arguments, options = problem()
    source = arguments[0].requires_grad_()
    saved = source.exp()
    with torch.no_grad(), use_backend(backend):
        delta_logits_(saved, *arguments[1:], **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


@every_backend
@pytest.mark.parametrize("adapters", [None, 2])
def test_opcheck(backend, adapters):
    arguments, options = problem(adapters=adapters)
    inputs = (*arguments, options["mean"], options["cols"], options.get("adapter_id"))
    with use_backend(backend):
        torch.library.opcheck(torch.ops.chassis.delta_logits_.default, inputs)
        torch.library.opcheck(torch.ops.chassis.delta_logits.default, inputs)
        leaves = [t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs]
        torch.library.opcheck(torch.ops.chassis.delta_logits.default, tuple(leaves))


@every_backend
def test_compiles_in_one_graph_with_dynamic_shapes(backend):
    def in_place(logits, hidden, U, V, bias, options):
        return delta_logits_(logits * 2, hidden, U, V, bias, **options) + 1

    def differentiable(logits, hidden, U, V, bias, options):
        return delta_logits(logits * 2, hidden, U, V, bias, **options).sin()

    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        with use_backend(backend):
            for step in (in_place, differentiable):
                compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
                for n in (5, 9, 12):
                    arguments, options = problem(n, adapters=2)
                    assert torch.equal(compiled(*arguments, options), step(*arguments, options))
            leaves = [t.requires_grad_() for t in arguments]
            found = torch.autograd.grad(compiled(*leaves, options).sum(), leaves)
            for a, b in zip(found, torch.autograd.grad(step(*leaves, options).sum(), leaves), strict=True):
                assert torch.equal(a, b)
    finally:
        torch.use_deterministic_algorithms(False)


@every_backend
def test_autocast_changes_nothing(backend):
    arguments, options = problem(adapters=2)
    leaves = [t.requires_grad_() for t in arguments]
    with use_backend(backend):
        plain = delta_logits(*leaves, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            other = delta_logits(*leaves, **options)
            found = torch.autograd.grad(other.sum(), leaves)
    assert torch.equal(plain, other)
    assert all(map(torch.equal, found, torch.autograd.grad(plain.sum(), leaves)))


def test_float64_runs_in_float64_and_an_override_says_so():
    arguments, options = cast(*problem(), torch.Tensor.double)
    assert (delta_logits(*arguments, **options) - eager(arguments, options)).abs().max() < 1e-13
    with use_backend("cpu"), pytest.raises(BackendError, match="delta_logits: backend 'cpu' was asked for, but .*"):
        delta_logits(*arguments, **options)


@needs_extension
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set_passes(isa):
    rerun_on(isa, __file__, "(matches_float64 or twice_that or repeated or keep_their_bits) and not reference")
