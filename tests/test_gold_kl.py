"""gold_kl: every backend against float64 autograd through the eager definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BUDGET, HALF, backends_of, each_backend_of, far_apart, rerun_on

from chassis_kernels import backends
from chassis_kernels.chunks import Chunks
from chassis_kernels.gold_kl import gold_kl
from chassis_kernels.reference import gold_kl as reference
from chassis_kernels.sparse import SparseProjection

HAVE = backends_of("gold_kl")
backend = each_backend_of("gold_kl")
COMPILED = [b for b in HAVE if b != "triton"]  # as against interpreted, which takes long


def problem(b=2, t_s=9, t_t=11, v_s=37, v_t=29, c=5, mapped=0.5, seed=0, dtype=torch.float32, scale=3.0):
    """Logits, a projection whose rows are exact with probability `mapped`, else spread, and chunks."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, v_t, (v_s, 2), generator=g)
    first = 0.5 + 0.5 * torch.rand(v_s, generator=g)
    exact = torch.rand(v_s, generator=g) < mapped
    ids[exact, 1] = -1
    weights = torch.stack([torch.where(exact, 1.0, first), torch.where(exact, 0.0, 1 - first)], 1)
    chunks = Chunks(
        torch.randint(-1, c, (b, t_s), generator=g),
        torch.randint(-1, c, (b, t_t), generator=g),
        torch.rand(b, c, generator=g) < 0.8,
        torch.rand(b, c, generator=g) < 0.7,
    )
    student = (scale * torch.randn(b, t_s, v_s, generator=g)).to(dtype)
    teacher = (scale * torch.randn(b, t_t, v_t, generator=g)).to(dtype)
    return student, teacher, SparseProjection(ids, weights, v_t), chunks


def run(function, student, teacher, *rest, **options):
    leaf = student.detach().requires_grad_()
    loss, metrics = function(leaf, teacher, *rest, **options)
    return loss.detach(), metrics, torch.autograd.grad(loss, leaf)[0]


def check(student, teacher, *rest, **options):
    """At most twice the error of the eager expression in the input dtype."""
    loss, metrics, grad = run(gold_kl, student, teacher, *rest, **options)
    right_loss, right_metrics, right = run(reference.loss, student.double(), teacher.double(), *rest, **options)
    _, _, eager = run(reference.loss, student.float(), teacher.float(), *rest, **options)
    unit = right.norm() + 1e-30
    assert grad.dtype == student.dtype and loss.dtype == torch.float32
    eager_error = (eager.to(student.dtype).double() - right).norm() / unit
    assert (grad.double() - right).norm() / unit <= 2 * eager_error + 1e-6
    assert abs(loss - right_loss) <= 4e-6 * (1 + abs(right_loss))
    for name in ("kl_common", "l1_uncommon"):
        torch.testing.assert_close(metrics[name].double(), right_metrics[name], rtol=1e-5, atol=1e-6)
    assert metrics["num_valid_chunks"] == right_metrics["num_valid_chunks"]
    return loss, grad


DRAWN = st.fixed_dictionaries(
    {
        "b": st.integers(1, 3),
        "t": st.tuples(st.integers(1, 12), st.integers(1, 12)),
        "v": st.tuples(st.integers(1, 120), st.integers(1, 120)),
        "c": st.integers(1, 6),
        "mapped": st.sampled_from([0.0, 0.5, 1.0]),
        "uncommon_topk": st.integers(0, 130),
        "temperature": st.sampled_from([1.0, 2.0, 0.5]),
        "reverse": st.booleans(),
        "relaxed": st.booleans(),
        "exact_only": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


def check_drawn(b, t, v, c, mapped, seed, **options):
    check(*problem(b, *t, *v, c, mapped, seed), **options)


@pytest.mark.parametrize("name", COMPILED)
@given(drawn=DRAWN)
@BUDGET
def test_value_and_gradient(name, drawn):
    with backends.use_backend(name):
        check_drawn(**drawn)


@pytest.mark.skipif("triton" not in HAVE, reason="no interpreter for Triton kernels")
@given(drawn=DRAWN)
@settings(BUDGET, max_examples=12)
def test_interpreted_value_and_gradient(drawn):
    with backends.use_backend("triton"):
        check_drawn(**drawn)


@pytest.mark.skipif("triton" not in HAVE, reason="no interpreter for Triton kernels")
def test_interpreted_blocks_of_chunks_and_tiles(monkeypatch):
    from chassis_kernels.triton import gold_kl as kernels

    monkeypatch.setattr(kernels, "CHUNKS", 3)
    with backends.use_backend("triton"):
        check(*problem(1, 14, 15, 1100, 1300, 8), uncommon_topk=200, reverse=True)


@pytest.mark.skipif("triton" not in HAVE, reason="no interpreter for Triton kernels")
def test_rows_far_apart_are_reached(int32_overflow_stops):
    """Offsets past 2^31 in logits and gradient, which is written over them."""
    arguments = list(backends.OPS["gold_kl_"].example("cpu"))[1:]
    near, teacher = arguments[1:3]
    far = far_apart(near)
    with backends.use_backend("triton"):
        found = torch.ops.chassis.gold_kl_(far, arguments[0], far, far_apart(teacher), *arguments[3:])
        right = torch.ops.chassis.gold_kl_(near, arguments[0], near, *arguments[2:])
    assert all(map(torch.equal, found, right)) and torch.equal(far, near)


@pytest.mark.parametrize("backend", COMPILED, indirect=True)
@pytest.mark.parametrize("reverse", [False, True])
def test_wide_vocabularies(reverse, backend):
    check(*problem(1, 40, 45, 3000, 5001, 30), uncommon_topk=700, reverse=reverse)
    check(*problem(2, 20, 20, 5000, 2500, 3), reverse=reverse, relaxed=True, temperature=1.5)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype, backend):
    """Equal logits tie among the uncommon tokens and leave their order open; the value does not depend on it."""
    student, teacher, *rest = problem(2, 20, 20, 300, 250, 9, dtype=dtype)
    loss, metrics, grad = run(gold_kl, student, teacher, *rest, uncommon_topk=0)
    right_loss, _, right = run(reference.loss, student.double(), teacher.double(), *rest, uncommon_topk=0)
    assert (grad.double() - right).norm() <= 2 * torch.finfo(dtype).eps * right.norm()
    loss, _, grad = run(gold_kl, student, teacher, *rest)
    right_loss, *_ = run(reference.loss, student.double(), teacher.double(), *rest)
    assert grad.dtype == dtype
    torch.testing.assert_close(loss.double(), right_loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse):
    student, *rest = problem(2, 5, 6, 9, 8, 4, scale=1.0, dtype=torch.float64)
    options = {"temperature": 1.5, "reverse": reverse, "uncommon_topk": 3}
    assert torch.autograd.gradcheck(lambda z: gold_kl(z, *rest, **options)[0], student.requires_grad_())


@pytest.mark.parametrize("name", ["gold_kl", "gold_kl_backward", "gold_kl_"])
def test_opcheck(name, backend):
    arguments = backends.OPS[name].example("cpu")
    if name == "gold_kl":
        arguments = (arguments[0].requires_grad_(), *arguments[1:])
    torch.library.opcheck(getattr(torch.ops.chassis, name).default, arguments)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_offsets(offset, backend):
    student, teacher, *rest = problem()
    check(student + offset, teacher + offset, *rest)


def test_minus_infinity(backend):
    student, teacher, *rest = problem()
    teacher[..., ::3] = -torch.inf
    loss, _, grad = run(gold_kl, student, teacher, *rest)
    right_loss, _, right = run(reference.loss, student.double(), teacher.double().clamp_min(-1e4), *rest)
    torch.testing.assert_close(loss.double(), right_loss, rtol=1e-5, atol=0)
    assert (grad.double() - right).norm() <= 1e-5 * right.norm()


def test_upstream_and_second_backward(backend):
    student, *rest = problem()
    leaf = student.requires_grad_()
    loss, _ = gold_kl(leaf, *rest)
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, leaf, retain_graph=True)[0])
    through = torch.autograd.grad((loss / 8).exp(), leaf)[0]
    torch.testing.assert_close(through, (loss.detach() / 8).exp() / 8 * first, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("options", [{}, {"reverse": True, "uncommon_topk": 7, "temperature": 2.0}], ids=str)
def test_gradient_into_a_buffer_and_over_the_logits(options, dtype, backend):
    student, *rest = problem(dtype=dtype)
    loss, metrics, right = run(gold_kl, student, *rest, **options)
    buffer = torch.full_like(student, torch.nan)
    again, same, grad = run(gold_kl, student, *rest, grad_buffer=buffer, **options)
    assert grad.data_ptr() == buffer.data_ptr() and same.keys() == metrics.keys()
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(grad, right, rtol=1e-2 if dtype in HALF else 1e-5, atol=1e-7)
    logits = student.clone().requires_grad_()
    gold_kl(logits, *rest, grad_buffer=logits, **options)[0].backward()
    assert torch.equal(logits.grad, grad)


def test_a_buffer_is_handed_over_once(backend):
    student, *rest = problem()
    leaf, buffer = student.clone().requires_grad_(), torch.empty_like(student)
    loss, _ = gold_kl(leaf, *rest, grad_buffer=buffer)
    (3 * loss).backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, 3 * run(gold_kl, student, *rest)[2])
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()
    with pytest.raises(ValueError, match="grad_buffer is"):
        gold_kl(leaf, *rest, grad_buffer=buffer.double())


def test_ranks_do_not_depend_on_the_chunk_before(backend):
    """A chunk starts from the bound of the one before it: peaked, underflowing and, last, flat rows in turn."""
    student, teacher, projection, _ = problem(1, 12, 12, 600, 500, mapped=0.3)
    scale = torch.tensor([1, 40, 1e-3, 200, 3, 0.5]).repeat(2)[None, :, None]
    ids = torch.arange(12)[None]
    chunks = Chunks(ids, ids, torch.ones(1, 12, dtype=torch.bool))
    check(student * scale, teacher * scale, projection, chunks, uncommon_topk=150)
    scale[:, ::2] = 0  # equal probabilities leave the gradient's order open, not the value
    given = student * scale, teacher * scale.flip(1), projection, chunks
    found, right = (run(function, *given, uncommon_topk=150)[1]["l1_uncommon"] for function in (gold_kl, reference.loss))
    torch.testing.assert_close(found, right, rtol=1e-5, atol=0)


@pytest.mark.parametrize("empty", [{"b": 0}, {"t_s": 0}, {"t_t": 0}], ids=str)
def test_nothing_to_compare(empty, backend):
    loss, metrics, grad = run(gold_kl, *problem(**empty))
    assert loss == 0 and metrics["num_valid_chunks"] == 0 and not grad.any()


def test_masked_samples_do_not_count(backend):
    student, *rest = problem()
    loss, metrics, grad = run(gold_kl, student, *rest, sample_mask=torch.tensor([0.0, 1.0]))
    assert loss != 0 and not grad[0].any() and grad[1].any()


@pytest.mark.skipif("cpu" not in HAVE, reason="the C++ extension is not built")
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set(isa):
    rerun_on(isa, __file__, "(wide or half or minus_infinity or upstream or chunk_before) and cpu")


def test_what_does_not_fit_is_refused():
    student, teacher, projection, chunks = problem()
    for arguments, options, message in (
        ((student[..., :36], teacher, projection, chunks), {}, "36 columns, expected the projection's 37"),
        ((student, teacher[..., :28], projection, chunks), {}, ">= 29"),
        ((student[:, 1:], teacher, projection, chunks), {}, "chunks.student is"),
        ((student, teacher, projection, chunks), {"temperature": 0.0}, "temperature is 0"),
        ((student, teacher, projection, chunks), {"uncommon_topk": -1}, "uncommon_topk is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            gold_kl(*arguments, **options)
