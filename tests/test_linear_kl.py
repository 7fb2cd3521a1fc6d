"""linear_kl: kernel and reference against the float64 truth, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import rerun_on

from chassis_kernels import BackendError, Delta, backends, linear_kl, use_backend

needs_extension = pytest.mark.skipif(backends._C is None, reason="the C++ extension is not built")
KERNELS = [b for b in ("cpu", "triton") if not backends.why_not("linear_kl", b, "cpu")]
each_kernel = pytest.mark.parametrize("backend", KERNELS)
each_backend = pytest.mark.parametrize("backend", ["reference", *KERNELS])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps
INF = torch.inf
BUDGET = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.T.contiguous().T,
    "columns of a wider matrix": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "every other column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "one row expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def problem(n=6, d=16, e=12, v=40, r=3, dtype=torch.float32, delta_dtype=None, seed=0):
    """(h_a, W_a, h_b, W_b), Delta: logits of standard deviation 3, a change of 0.5."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, d), (v, d), (n, e), (v, e), (n, r), (r, v), (v,))
    scales = (3, max(d, 1) ** -0.5, 3, max(e, 1) ** -0.5, 0.5, max(r, 1) ** -0.5, 0.1)
    tensors = [torch.randn(shape, generator=generator) * scale for shape, scale in zip(shapes, scales, strict=True)]
    heads = [t.to(dtype) for t in tensors[:4]]
    return heads, Delta(*(t.to(delta_dtype or dtype) for t in tensors[4:]))


def double(value):
    if isinstance(value, torch.Tensor):
        return value.double()
    return Delta(*map(double, value)) if isinstance(value, Delta) else value


def truth(heads, **options):
    with use_backend("reference"):
        return linear_kl(*map(double, heads), **{name: double(value) for name, value in options.items()})


def eager(h_a, W_a, h_b, W_b, delta=None):
    """What one writes without this op, in the inputs' own dtype."""
    a = h_a @ W_a.T if delta is None else h_a @ W_a.T + delta.u @ delta.v + delta.c
    return F.kl_div(a.log_softmax(1), (h_b @ W_b.T).log_softmax(1), log_target=True, reduction="none").sum(1)


def test_reference_is_the_definition():
    heads, delta = problem()
    h_a, W_a, h_b, W_b = map(double, heads)
    bias_a, bias_b = torch.randn(2, 40).double()
    a = 20 * torch.tanh(0.5 * (h_a @ W_a.T + bias_a + double(delta.u) @ double(delta.v) + double(delta.c)) / 20)
    b = 9 * torch.tanh(2 * (h_b @ W_b.T + bias_b) / 9)
    options = {"bias_a": bias_a, "bias_b": bias_b, "softcap_a": 20.0, "softcap_b": 9.0, "scale_a": 0.5, "scale_b": 2.0}
    kl, stats = linear_kl(h_a, W_a, h_b, W_b, delta=double(delta), stats=True, **options)
    want = F.kl_div(a.log_softmax(1), b.log_softmax(1), log_target=True, reduction="none").sum(1)
    assert torch.allclose(kl, want, rtol=1e-12, atol=1e-12)
    assert torch.allclose(stats.lse_a, a.logsumexp(1)) and torch.allclose(stats.lse_b, b.logsumexp(1))
    assert torch.equal(stats.argmax_a, a.argmax(1)) and torch.equal(stats.argmax_b, b.argmax(1))
    explicit = linear_kl(h_a, W_a, b, None, bias_a=bias_a, delta=double(delta), softcap_a=20.0, scale_a=0.5)
    assert torch.allclose(explicit, kl, rtol=1e-12, atol=1e-12)


DRAWN = st.fixed_dictionaries(
    {
        "n": st.one_of(st.integers(0, 20), st.sampled_from([96, 97, 200])),
        "sizes": st.tuples(*[st.one_of(st.integers(0, 40), st.sampled_from([127, 129, 385]))] * 2),
        "v": st.one_of(st.integers(1, 90), st.sampled_from([255, 256, 257, 700])),
        "r": st.one_of(st.none(), st.integers(0, 20)),
        "given_b": st.booleans(),
        "bias": st.booleans(),
        "caps": st.tuples(*[st.sampled_from([None, 4.0, 30.0])] * 2),
        "scales": st.tuples(*[st.sampled_from([1.0, 0.3, -1.5])] * 2),
        "dtypes": st.lists(st.sampled_from(DTYPES), min_size=9, max_size=9),
        "layouts": st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=4, max_size=4),
        "seed": st.integers(0, 99),
    }
)


def check_drawn(backend, n, sizes, v, r, given_b, bias, caps, scales, dtypes, layouts, seed):
    heads, delta = problem(n, *sizes, v, r or 0, seed=seed)
    heads = [LAYOUTS[name](t.to(dtype)) if t.numel() else t for name, t, dtype in zip(layouts, heads, dtypes, strict=False)]
    delta = Delta(*(t.to(dtype) for t, dtype in zip(delta, dtypes[4:7], strict=True)))
    options = {"delta": None if r is None else delta, "softcap_a": caps[0], "scale_a": scales[0]}
    if given_b:
        heads[2:] = [(torch.randn(n, v) * 3).to(dtypes[2]), None]
    else:
        options |= {"softcap_b": caps[1], "scale_b": scales[1]}
    if bias:
        names = ("bias_a",) if given_b else ("bias_a", "bias_b")
        options |= {name: torch.randn(v).to(dtype) for name, dtype in zip(names, dtypes[7:], strict=False)}
    with use_backend(backend):
        kl, stats = linear_kl(*heads, stats=True, **options)
    want, exact = truth(heads, stats=True, **options)
    # A logit is a sum of products in fp32, a few eps of the size of its terms (< 60 here); KL averages their differences.
    assert kl.dtype == torch.float32 and kl.shape == (n,)
    for found, correct in ((kl, want), (stats.lse_a, exact.lse_a), (stats.lse_b, exact.lse_b)):
        assert torch.allclose(found.double(), correct, rtol=8 * EPS, atol=200 * EPS)
    for found, correct in ((stats.argmax_a, exact.argmax_a), (stats.argmax_b, exact.argmax_b)):
        assert found.shape == correct.shape and (n == 0 or 0 <= int(found.min()) <= int(found.max()) < v)


@needs_extension
@given(drawn=DRAWN)
@BUDGET
def test_kernel_matches_float64(drawn):
    check_drawn("cpu", **drawn)


def collect(heads, delta, run, weight):
    leaves = [t.detach().requires_grad_() for t in delta]
    kl = run(*heads, delta=Delta(*leaves))
    return kl.detach(), *torch.autograd.grad(kl, leaves, weight.to(kl.dtype))


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "v", "uniform"), [(40, 64, 300, False), (40, 64, 300, True), (200, 512, 1000, False)])
def test_error_is_at_most_twice_that_of_eager(backend, dtype, n, d, v, uniform):
    heads, delta = problem(n, d, d // 2, v, 8, dtype)
    weight = torch.full((n,), 1 / n) if uniform else torch.randn(n)
    with use_backend("reference"):
        want = collect([t.double() for t in heads], double(delta), linear_kl, weight)
    with use_backend(backend):
        found = collect(heads, delta, linear_kl, weight)
    for ours, plain, correct in zip(found, collect(heads, delta, eager, weight), want, strict=True):
        assert (ours - correct).abs().mean() <= 2 * (plain - correct).abs().mean()
        assert (ours - correct).abs().max() <= 2 * (plain - correct).abs().max()


@each_backend
def test_equal_distributions_differ_by_nothing_but_rounding(backend):
    (h, W, *_), delta = problem(50, 64, v=3000)
    with use_backend(backend):
        assert linear_kl(h, W, h.clone(), W.clone()).abs().max() <= 4 * EPS
        # A change of logits of size s gives a KL of s^2 / 2 Var: 1e-3 leaves 5e-7, still to a few per cent.
        small = Delta(delta.u * 2e-3, delta.v, delta.c * 0)
        kl = linear_kl(h, W, h, W, delta=small)
        assert (kl - truth((h, W, h, W), delta=small)).abs().max() <= 8 * EPS


@each_backend
def test_near_certainty_keeps_its_digits(backend):
    logits = torch.zeros(3, 500)
    logits[:, 7] = torch.tensor([10.0, 20.0, 60.0])
    (h, W, *_), _ = problem(3, 500, v=500)
    h, W = logits - 0.5 * torch.nn.functional.one_hot(torch.tensor([7] * 3), 500), torch.eye(500)
    leaf = torch.zeros(500, requires_grad=True)
    with use_backend(backend):
        kl = linear_kl(h, W, logits, None, delta=Delta(torch.zeros(3, 1), torch.zeros(1, 500), leaf))
        (grad,) = torch.autograd.grad(kl.sum(), leaf)
    p = [t.double().softmax(1) for t in (h, logits)]
    assert torch.allclose(grad.double(), (p[0] - p[1]).sum(0), rtol=1e-3, atol=EPS)
    assert torch.allclose(kl.double(), truth((h, W, logits, None)), rtol=1e-4, atol=EPS)


@each_backend
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_an_offset_of_the_logits_changes_nothing_it_does_not_round(backend, offset):
    logits = torch.randint(-64, 64, (9, 700)) / 8.0  # exact in fp32 also with the offset
    other = torch.randint(-64, 64, (9, 700)) / 8.0
    eye = torch.eye(700)
    with use_backend(backend):
        want = linear_kl(other, eye, logits, None)
        assert torch.equal(linear_kl(other, eye, logits + offset, None), want)
        assert torch.equal(linear_kl(other, eye, logits, None, bias_a=torch.full((700,), offset)), want)


@each_backend
def test_minus_infinity_on_either_side(backend):
    v = 600
    eye, a, b = torch.eye(v), torch.randn(6, v), torch.randn(6, v)
    bias = torch.zeros(v)
    bias[5:300] = -INF  # tokens that a excludes
    b[0:4, 5:300] = -INF  # b excludes them too, except rows 4 and 5
    b[1, 400:] = -INF  # p_b = 0 < p_a adds nothing
    b[2, :], b[2, 511] = -INF, 3.0  # all mass on one token
    b[3] = -INF  # no distribution at all
    b[4, 5:300] = -1e4  # mass that underflows is mass
    with use_backend(backend):
        kl, stats = linear_kl(a, eye, b, None, bias_a=bias, stats=True)
        plain = linear_kl(a[:3, 300:], eye[300:, 300:], b[:3, 300:], None)
    want = truth((a, eye, b, None), bias_a=bias)
    assert torch.allclose(kl[:3].double(), want[:3], rtol=1e-5)
    assert kl[3].isnan() and kl[4] == INF and kl[5] == INF
    assert torch.allclose(kl[2], stats.lse_a[2].float() - a[2, 511], rtol=1e-5)
    assert stats.argmax_b[2] == 511 and plain.isfinite().all()


@each_backend
def test_gradient_is_finite_where_the_divergence_is_not(backend):
    v = 300
    bias = torch.zeros(v)
    bias[3:9] = -INF
    u, w = torch.randn(4, 2).requires_grad_(), torch.randn(2, v).requires_grad_()
    with use_backend(backend):
        kl = linear_kl(torch.randn(4, v), torch.eye(v), torch.randn(4, v), None, bias_a=bias, delta=Delta(u, w))
        grads = torch.autograd.grad(kl.sum(), (u, w))
    assert (kl == INF).all() and all(g.isfinite().all() for g in grads)


@each_backend
def test_nan_marks_its_own_row_only(backend):
    heads, _ = problem(5, v=300)
    clean = linear_kl(*heads)
    heads[0][1, 3], heads[2][3, 0] = torch.nan, torch.nan
    with use_backend(backend):
        kl = linear_kl(*heads)
    assert kl.isnan().tolist() == [False, True, False, True, False]
    assert torch.allclose(kl[::2], clean[::2], rtol=1e-5)


@each_backend
def test_ties_go_to_the_lowest_id(backend):
    h, W = torch.ones(2, 1), torch.zeros(1000, 1)
    W[[999, 300, 700]] = 2.0
    with use_backend(backend):
        _, stats = linear_kl(h, W, h, W, stats=True)
    assert stats.argmax_a.tolist() == stats.argmax_b.tolist() == [300, 300]


@each_backend
@pytest.mark.parametrize(("n", "r"), [(0, 3), (4, 0), (0, 0)])
def test_no_rows_or_no_rank(backend, n, r):
    heads, delta = problem(n, r=r)
    leaves = Delta(*(t.requires_grad_() for t in delta))
    with use_backend(backend):
        kl = linear_kl(*heads, delta=leaves)
        kl.sum().backward()
    assert torch.allclose(kl.double(), truth(heads, delta=delta), atol=1e-5)
    assert all(t.grad.shape == t.shape and t.grad.isfinite().all() for t in leaves)


def test_gradcheck():
    heads, delta = problem(3, 4, 5, 7, 2)
    heads, delta = [t.double() for t in heads], [t.double().requires_grad_() for t in delta]
    options = {"softcap_a": 5.0, "softcap_b": 3.0, "scale_a": 0.7, "scale_b": 1.3}
    assert torch.autograd.gradcheck(lambda *t: linear_kl(*heads, delta=Delta(*t), **options), delta)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"softcap_a": 4.0, "scale_a": 0.6}])
def test_gradients_with_a_producer_upstream_and_twice(backend, dtype, options):
    heads, delta = problem(130, 20, 20, 300, 5, delta_dtype=dtype)
    weight = torch.randn(130)

    def gradients(convert):
        leaves = [convert(t).detach().requires_grad_() for t in delta]
        u, v, c = leaves
        kl = linear_kl(*map(convert, heads), delta=Delta(u.exp(), v.tanh(), c), **options)
        loss = (kl * weight).sum() + kl.logsumexp(0)
        once = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert all(map(torch.equal, once, torch.autograd.grad(loss, leaves)))
        return once

    with use_backend(backend):
        found = gradients(lambda t: t)
    for grad, want in zip(found, gradients(torch.Tensor.double), strict=True):
        # exp(u), tanh(v) and the gradients are rounded to the dtype, what lies between is float32
        assert (grad - want).abs().max() <= 16 * torch.finfo(dtype).eps * want.abs().max()


def test_only_what_requires_grad_gets_one_and_the_rest_is_refused():
    heads, (u, v, c) = problem()
    v.requires_grad_()
    linear_kl(*heads, delta=Delta(u, v)).sum().backward()
    assert v.grad is not None and u.grad is None
    with torch.no_grad():
        assert not linear_kl(*heads, delta=Delta(u, v, c)).requires_grad
    heads[1].requires_grad_()
    with pytest.raises(RuntimeError, match="delta's factors only, but W_a require grad"):
        linear_kl(*heads)
    with torch.no_grad():
        linear_kl(*heads)


def test_a_second_derivative_raises():
    heads, delta = problem()
    u = delta.u.requires_grad_()
    (grad,) = torch.autograd.grad(linear_kl(*heads, delta=Delta(u, delta.v)).sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W_a": torch.zeros(40, 15)}, r"W_a has shape \(40, 15\), expected \(40, 16\)"),
        ({"W_b": torch.zeros(48, 12)}, r"W_b has shape \(48, 12\), expected \(40, 12\)"),
        ({"h_b": torch.zeros(5, 12)}, r"h_b has shape \(5, 12\), expected \(6, 12\)"),
        ({"W_b": None}, r"h_b has shape \(6, 12\), expected \(6, 40\)"),
        ({"W_a": torch.zeros(0, 16)}, "V > 0"),
        ({"bias_b": torch.zeros(1, 40)}, "bias_b has shape"),
        ({"delta": Delta(torch.zeros(6, 2), torch.zeros(3, 40))}, r"delta.v has shape \(3, 40\), expected \(2, 40\)"),
        ({"delta": Delta(torch.zeros(2), torch.zeros(2, 40))}, r"delta.u must be \[N, r\]"),
        ({"softcap_a": 0.0}, "a softcap is positive"),
        ({"h_b": torch.zeros(6, 40), "W_b": None, "scale_b": 2.0}, "scale_b do not apply"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    heads, _ = problem()
    with pytest.raises(ValueError, match=message):
        linear_kl(**(dict(zip(("h_a", "W_a", "h_b", "W_b"), heads, strict=True)) | change))


@needs_extension
def test_offsets_beyond_two_to_the_31_elements(tmp_path):
    stride = 2**31 + 5
    file = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * stride, dtype=torch.bfloat16)
    heads, _ = problem(2, dtype=torch.bfloat16)
    far = file.as_strided((2, 16), (stride, 1)).copy_(heads[0])
    assert torch.equal(linear_kl(far, *heads[1:]), linear_kl(*heads))


@needs_extension
def test_results_repeat_for_a_number_of_threads_and_agree_across():
    heads, delta = problem(130, 40, 40, 900)
    leaves = [t.requires_grad_() for t in delta]
    threads, found = torch.get_num_threads(), {}
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            kl = linear_kl(*heads, delta=Delta(*leaves))
            results = [kl.detach(), *torch.autograd.grad(kl.sum(), leaves)]
            assert all(map(torch.equal, results, found.setdefault(count, results)))
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(found[1], found[3], strict=True):
        assert torch.allclose(one, three, rtol=1e-4, atol=1e-5)


def test_float64_runs_in_float64_and_an_override_says_so():
    heads, _ = problem()
    heads = [t.double() for t in heads]
    assert linear_kl(*heads).dtype == torch.float64
    with use_backend("cpu"), pytest.raises(BackendError, match="linear_kl: backend .cpu. was asked for, but"):
        linear_kl(*heads)


@needs_extension
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set_passes(isa):
    chosen = "test_kernel_matches or (cpu and (twice_that or minus_infinity or offset or producer))"
    rerun_on(isa, __file__, chosen)
