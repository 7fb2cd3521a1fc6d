"""token_kl: every backend against float64 autograd through the eager definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import BUDGET, HALF, backends_of, each_backend_of, far_apart, rerun_on

from chassis_kernels import backends
from chassis_kernels.reference import token_kl as reference
from chassis_kernels.token_kl import token_kl

HAVE = backends_of("token_kl")
backend = each_backend_of("token_kl")


def problem(b=2, t=7, v=50, extra=3, dtype=torch.float32, seed=0, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(b, t, n, generator=g) for n in (v, v + extra))
    mask = torch.rand(b, t, generator=g) * (torch.rand(b, t, generator=g) < 0.7)
    return student.to(dtype), teacher.to(dtype), mask


def run(function, student, teacher, mask, **options):
    leaf = student.detach().requires_grad_()
    loss = function(leaf, teacher, mask, n_tokens=3.0, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def check(student, teacher, mask, **options):
    """At most twice the error of the eager expression in the input dtype."""
    loss, grad = run(token_kl, student, teacher, mask, **options)
    right_loss, right = run(reference.loss, student.double(), teacher.double(), mask, **options)
    _, eager = run(reference.loss, student.float(), teacher.float(), mask, **options)
    unit = right.norm() + 1e-30
    assert grad.dtype == student.dtype and loss.dtype == torch.float32
    eager_error = (eager.to(student.dtype).double() - right).norm() / unit
    assert (grad.double() - right).norm() / unit <= 2 * eager_error + 4e-7
    assert abs(loss - right_loss) <= 2e-6 * (1 + abs(right_loss))
    return loss, grad


@pytest.mark.parametrize("name", HAVE)
@given(
    b=st.integers(0, 3),
    t=st.integers(0, 9),
    v=st.integers(1, 120),
    extra=st.integers(0, 5),
    topk=st.one_of(st.none(), st.integers(1, 130)),
    dtype=st.sampled_from([torch.float32, *HALF]),
    temperature=st.sampled_from([1.0, 2.0, 0.5]),
    reverse=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
@BUDGET
def test_value_and_gradient(name, b, t, v, extra, topk, dtype, temperature, reverse, transposed, seed):
    student, teacher, mask = problem(b, t, v, extra, dtype, seed)
    if transposed:
        student, teacher = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (student, teacher))
    with backends.use_backend(name):
        check(student, teacher, mask, temperature=temperature, reverse=reverse, vocab_topk=topk)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("topk", [None, 90, 700])
def test_several_tiles(topk, reverse, backend):
    check(*problem(1, 6, 1300), vocab_topk=topk, reverse=reverse, temperature=1.5)


@pytest.mark.skipif("triton" not in HAVE, reason="no interpreter for Triton kernels")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("columns", [None, torch.arange(5, 25)])
def test_rows_far_apart_are_reached(columns, reverse, int32_overflow_stops):
    """Offsets past 2^31 in logits and gradient, which is written over them."""
    student, teacher, _ = problem(1, 4, 60, dtype=torch.bfloat16)
    near, teacher, weight = student[0].clone(), teacher[0], torch.ones(4)
    far = far_apart(near)
    with backends.use_backend("triton"):
        kl = torch.ops.chassis.token_kl_(far, weight, far, far_apart(teacher), columns, None, 2.0, reverse)
        near_kl = torch.ops.chassis.token_kl_(near, weight, near, teacher, columns, None, 2.0, reverse)
    assert torch.equal(kl, near_kl) and torch.equal(far, near)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("topk", [None, 5])
def test_gradcheck(reverse, topk):
    student, teacher, mask = problem(2, 3, 9, scale=1.0, dtype=torch.float64)
    options = {"temperature": 1.5, "reverse": reverse, "vocab_topk": topk, "n_tokens": 2.0}
    assert torch.autograd.gradcheck(lambda z: token_kl(z, teacher, mask.double(), **options), student.requires_grad_())


@pytest.mark.parametrize("name", ["token_kl", "token_kl_backward", "token_kl_"])
def test_opcheck(name, backend):
    arguments = backends.OPS[name].example("cpu")
    if name == "token_kl":
        arguments = (arguments[0].requires_grad_(), *arguments[1:])
    torch.library.opcheck(getattr(torch.ops.chassis, name).default, arguments)


def test_equal_models_have_no_gradient_noise(backend):
    """p - q is formed in float32, before the one rounding to bfloat16: at p near 1 nothing of bfloat16's 4e-3 is left."""
    student, _, mask = problem(dtype=torch.bfloat16)
    student[..., 4] += 30
    for topk in (None, 20):
        loss, grad = run(token_kl, student, student.clone(), mask, vocab_topk=topk)
        assert loss == 0 and grad.abs().max() <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_offsets(offset, backend):
    student, teacher, mask = problem()
    check(student + offset, teacher + offset, mask)


def test_minus_infinity(backend):
    student, teacher, mask = problem(extra=0)
    teacher[..., 1::3] = -torch.inf
    loss, grad = run(token_kl, student, teacher, mask)
    right_loss, right = run(reference.loss, student.double(), teacher.double().clamp_min(-1e4), mask)
    torch.testing.assert_close(loss.double(), right_loss, rtol=1e-5, atol=0)
    assert (grad.double() - right).norm() <= 1e-5 * right.norm()
    student[..., 1::3] = -torch.inf
    for reverse in (False, True):
        loss, grad = run(token_kl, student, teacher, mask, reverse=reverse)
        assert loss.isfinite() and grad.isfinite().all() and not grad[..., 1::3].any()


def test_masked_rows_are_not_read(backend):
    student, teacher, mask = problem()
    rows = mask == 0
    _, grad = run(token_kl, student, teacher, mask)
    student[rows], teacher[rows] = torch.nan, torch.nan
    loss, poisoned = run(token_kl, student, teacher, mask)
    assert loss.isfinite() and torch.equal(grad, poisoned) and not grad[rows].any()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    "options", [{}, {"vocab_topk": 20, "reverse": True}, {"vocab_topk": 20, "temperature": 2.0}], ids=str
)
def test_gradient_into_a_buffer_and_over_the_logits(options, dtype, backend):
    student, teacher, mask = problem(v=53, dtype=dtype)
    loss, right = run(token_kl, student, teacher, mask, **options)
    buffer = torch.full_like(student, torch.nan)
    again, grad = run(token_kl, student, teacher, mask, grad_buffer=buffer, **options)
    assert grad.data_ptr() == buffer.data_ptr()
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(grad, right, rtol=1e-2 if dtype in HALF else 1e-5, atol=1e-7)
    logits = student.clone().requires_grad_()
    token_kl(logits, teacher, mask, n_tokens=3.0, grad_buffer=logits, **options).backward()
    assert torch.equal(logits.grad, grad)


def test_a_buffer_is_handed_over_once(backend):
    student, teacher, mask = problem()
    leaf, buffer = student.requires_grad_(), torch.empty_like(student)
    loss = token_kl(leaf, teacher, mask, n_tokens=3.0, grad_buffer=buffer)
    (3 * loss).backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, 3 * run(token_kl, student.detach(), teacher, mask)[1])
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()
    buffer.fill_(1)
    with torch.no_grad():
        token_kl(leaf, teacher, mask, n_tokens=3.0, grad_buffer=buffer)
    assert (buffer == 1).all()
    with pytest.raises(ValueError, match="grad_buffer is"):
        token_kl(leaf, teacher, mask, n_tokens=3.0, grad_buffer=buffer.double())


def test_second_backward_and_upstream(backend):
    student, teacher, mask = problem()
    leaf = student.requires_grad_()
    loss = token_kl(leaf, teacher, mask, n_tokens=3.0, vocab_topk=9)
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, leaf, retain_graph=True)[0])
    through = torch.autograd.grad((loss / 8).exp(), leaf)[0]
    torch.testing.assert_close(through, (loss.detach() / 8).exp() / 8 * first, rtol=1e-5, atol=1e-9)


@pytest.mark.skipif("cpu" not in HAVE, reason="the C++ extension is not built")
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set(isa):
    rerun_on(isa, __file__, "(value_and or minus_infinity or buffer) and cpu")


def test_what_does_not_fit_is_refused():
    student, teacher, mask = problem()
    for arguments, options, message in (
        ((student[0], teacher, mask), {}, "student_logits are"),
        ((student, teacher[..., :49], mask), {}, r"\[B, T, >= V\]"),
        ((student.long(), teacher, mask), {}, "student_logits are torch.int64"),
        ((student, teacher, mask[:1]), {}, "mask has shape"),
        ((student, teacher, mask), {"column_mask": mask}, "column_mask is torch.float32"),
        ((student, teacher, mask), {"temperature": 0.0}, "temperature is 0"),
        ((student, teacher, mask), {"vocab_topk": 0}, "vocab_topk is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            token_kl(*arguments, n_tokens=1.0, **options)
