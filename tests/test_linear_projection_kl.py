"""linear_projection_kl: every backend against float64 autograd through the eager definition; the contract of the op."""

import pytest
import torch
from hypothesis import given
from linear_projection_problems import DRAWN, DTYPES, FORMS, check, check_drawn, module, problem, run, truth
from support import BUDGET, LiveMemory, backends_of, each_backend_of, rerun_on

from chassis_kernels import TopK, backends, linear_projection_kl, projection_kl
from chassis_kernels.reference import teacher as teacher_logits

HAVE = backends_of("linear_projection_kl")
backend = each_backend_of("linear_projection_kl")
COMPILED = [b for b in HAVE if b != "triton"]  # as against interpreted, which takes long
OPS = ("linear_projection_kl", "linear_projection_kl_backward")


@pytest.mark.parametrize("name", COMPILED)
@given(drawn=DRAWN)
@BUDGET
def test_value_and_gradients(name, drawn):
    with backends.use_backend(name):
        check_drawn(**drawn)


@pytest.mark.parametrize("backend", COMPILED, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 130, 140, 700, 600, 300, 4, 60, 200), (2, 50, 40, 1500, 900, 64, 2, 40, 899)])
def test_several_blocks_and_tiles(shape, dtype, backend):
    check(problem(*shape, temperature=1.5, student_softcap=20.0).to(dtype))


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
def test_gradcheck(divergence):
    p = problem(2, 5, 6, 9, 8, 3, 2, 4, 5, divergence=divergence, student_softcap=5.0, tail=True).to(torch.float64)

    def loss(hidden, weight, bias):
        return linear_projection_kl(hidden, weight, *p[3:6], student_bias=bias, **p.options)[0]

    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in p[:3]])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
@pytest.mark.parametrize("tail", [False, True])
def test_equals_projection_kl_of_the_logits(form, divergence, tail, backend):
    p = problem(form=form, divergence=divergence, tail=tail, temperature=2.0)
    labels = torch.randint(-1, 37, (2, 9), generator=torch.Generator().manual_seed(5))
    loss, stats, _ = run(p, labels=labels)
    z = p.hidden @ p.weight.T + p.bias
    teacher = teacher_logits.logits(p.teacher, 29)
    want, other = projection_kl(z, teacher, *p[4:6], **p.options, labels=labels, columns=stats.columns)
    torch.testing.assert_close(loss, want, rtol=2e-6, atol=2e-6)
    assert torch.equal(stats.columns, projection_kl(z, teacher, *p[4:6], **p.options)[1].columns)
    assert stats.accuracy == other.accuracy and stats.valid_pairs == other.valid_pairs and stats.touched == 1
    torch.testing.assert_close(stats.nll, other.nll, rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.correct, other.correct)


def test_labels(backend):
    """With label_weight in the pass of the loss, without it through stats.nll: the same gradients."""
    p = problem(temperature=2.0)
    g = torch.Generator().manual_seed(5)
    labels, weight = torch.randint(-1, 37, (2, 9), generator=g), torch.rand(2, 9, generator=g)
    p.chunks.student[0] = -1
    loss, stats, grads = run(p, labels=labels, label_weight=weight)
    assert not stats.nll.requires_grad and not stats.nll[labels < 0].any()
    right = truth(p._replace(options=p.options | {"labels": labels, "label_weight": weight}))
    torch.testing.assert_close(loss.double(), right[0], rtol=1e-5, atol=1e-6)
    leaves = [t.detach().requires_grad_() for t in p[:3]]
    plain, stats = linear_projection_kl(*leaves[:2], *p[3:6], student_bias=leaves[2], **p.options, labels=labels)
    total = plain + (stats.nll * weight).sum()
    for one, other, want in zip(torch.autograd.grad(total, leaves), grads, right[2], strict=True):
        torch.testing.assert_close(one.double(), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.double(), want, rtol=1e-4, atol=1e-5)


def test_upstream_gradients(backend):
    p = problem(sample_mask=torch.tensor([0.25, 1.5]), denominator=3)
    loss, _, grads = check(p)
    through = run(p, upstream=lambda x: (x / 8).exp())[2]
    for found, grad in zip(through, grads, strict=True):
        torch.testing.assert_close(found, (loss / 8).exp() / 8 * grad, rtol=1e-5, atol=1e-9)


def test_second_backward_is_exact(backend):
    p = problem()
    leaves = [t.requires_grad_() for t in p[:3]]
    loss, _ = linear_projection_kl(*leaves[:2], *p[3:6], student_bias=leaves[2], **p.options)
    first = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(2 * loss, leaves, retain_graph=True)))
    (grad,) = torch.autograd.grad(loss, leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_under_loss_scaling_are_rounded_once(dtype, backend):
    """A loss scale must reach the gradient before it is rounded: unscaled, these would be subnormal or 0 in float16."""
    p = problem(denominator=1e6).to(dtype)
    scaled = run(p, upstream=lambda x: x * 2**16)[2]
    for found, want in zip(scaled, truth(p)[2], strict=True):
        assert (found.double() / 2**16 - want).norm() <= 2 * torch.finfo(dtype).eps * want.norm()


@pytest.mark.parametrize("keep", [False, True])
def test_error_does_not_grow_with_the_number_of_blocks(keep, monkeypatch):
    """dW is summed in float32 over blocks of rows, also for bfloat16 weights, be it block by block or over all at once."""
    monkeypatch.setattr(module, "keeps_rows", lambda *sizes: keep)
    p = problem(1, 400, 400, 64, 50, 16, 2, 150, 30).to(torch.bfloat16)
    right, errors = truth(p)[2][1], []
    for block in (2, 20, 400):
        monkeypatch.setattr(module, "BLOCK_ROWS", (block, block))
        errors.append((run(p)[2][1].double() - right).norm() / right.norm())
    assert max(errors) <= 1.2 * min(errors)


@pytest.mark.skipif("cpu" not in HAVE, reason="no C++ implementation")
@pytest.mark.parametrize(("rows", "kind"), [(19, torch.bfloat16), (20, torch.float32)])
def test_a_bfloat16_head_has_float32_sums_only_where_they_are_the_smaller(rows, kind, monkeypatch):
    made, empty = [], module.pages.empty
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(module.pages, "empty", lambda shape, dtype, *at: made.append(dtype) or empty(shape, dtype, *at))
    with backends.use_backend("cpu"):
        check(problem(1, rows, 11, d=20, c=2).to(torch.bfloat16))
    assert made[0] == kind


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False, False, False)])
def test_only_what_requires_grad_gets_one(needs, backend):
    p = problem()
    _, _, every = run(p)
    loss, _, grads = run(p, needs=needs)
    for need, grad, want in zip(needs, grads, every, strict=True):
        assert torch.equal(grad, want) if need else grad is None
    with torch.no_grad():
        assert torch.equal(run(p)[0], loss)


@pytest.mark.parametrize(
    "empty",
    [{"b": 0}, {"t_s": 0}, {"t_t": 0}, {"d": 0}, {"k": 0}, {"sample_mask": torch.zeros(2)}, {"c": 1, "exact_only": True}],
    ids=str,
)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_compare(empty, form, backend):
    loss, stats, grads = run(problem(form=form, **empty))
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)
    if stats.valid_pairs == 0:
        assert loss == 0 and not any(g.any() for g in grads)


def test_heads_wider_than_their_tokenizers(backend):
    p = problem()
    loss, _, grads = run(p)
    wide = [torch.cat([t, torch.full((4, *t.shape[1:]), 70.0)]) for t in p[1:3]]
    wide_loss, _, wide_grads = run(p._replace(weight=wide[0], bias=wide[1]))
    torch.testing.assert_close(wide_loss, loss)
    for found, grad in zip(wide_grads[1:], grads[1:], strict=True):
        torch.testing.assert_close(found[:37], grad)
        assert not found[37:].any()


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_offsets(offset, backend):
    p = problem()
    check(p._replace(bias=(p.bias * 8).round() / 8 + offset))


def test_a_chunk_longer_than_a_block(backend, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ROWS", (4, 4))
    p = problem(1, 40, 5, c=2)
    p.chunks.student[:] = 0
    p.chunks.valid[:] = True
    check(p)


@pytest.mark.skipif("cpu" not in HAVE, reason="no C++ implementation")
@pytest.mark.parametrize("form", FORMS)
def test_no_tensor_of_all_logits_is_made(form):
    """The extension's block of logits is its own; tensors are results, columns and the teacher's tile."""
    p = problem(1, 600, 600, 4000, 300, 8, 1, 300, 50, form=form)
    p.projection.columns  # noqa: B018 - kept by the projection
    with LiveMemory() as live, backends.use_backend("cpu"):
        run(p)
    assert live.peak < 4 * 600 * 4000 / 4


@pytest.mark.parametrize("backend", COMPILED, indirect=True)
def test_results_repeat_for_a_number_of_threads_and_agree_across(backend):
    p = problem(2, 40, 40, 900, 800, 30, 3, 20, 300)
    found, before = {}, torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            loss, _, grads = run(p)
            assert all(map(torch.equal, (loss, *grads), found.setdefault(threads, (loss, *grads))))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(found[1], found[3], strict=True):
        torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-6)


def test_autocast(backend):
    p = problem(form="head")
    plain = run(p)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(p)
    assert torch.equal(plain[0], cast[0]) and all(map(torch.equal, plain[2], cast[2]))


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, backend):
    arguments = list(backends.OPS[name].example("cpu"))
    if name == "linear_projection_kl":
        arguments[:3] = [t.requires_grad_() for t in arguments[:3]]
    torch.library.opcheck(getattr(torch.ops.chassis, name).default, tuple(arguments))


def test_compiled_without_graph_breaks(backend):
    torch._dynamo.reset()
    p = problem()

    def step(hidden, weight, bias, teacher, chunks):
        return linear_projection_kl(hidden, weight, teacher, p.projection, chunks, student_bias=bias, vocab_topk=12)[0]

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    found = []
    for f in (step, compiled):
        leaves = [t.detach().requires_grad_() for t in p[:3]]
        f(*leaves, p.teacher, p.chunks).backward()
        found.append([t.grad for t in leaves])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif("cpu" not in HAVE, reason="no C++ implementation")
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set(isa):
    rerun_on(isa, __file__, "several_blocks and cpu")


def test_what_does_not_fit_is_refused():
    p = problem()
    for change, options, message in (
        ({"hidden": p.hidden[0]}, {}, "student_hidden is torch.float32"),
        ({"weight": p.weight[:36]}, {}, r"expected \(>= 37, 6\)"),
        ({"weight": p.weight[:, :5]}, {}, r"student_weight has shape \(37, 5\)"),
        ({"bias": p.bias[:36]}, {}, r"student_bias has shape \(36,\), expected \(37,\)"),
        ({"teacher": p.teacher[..., :28]}, {}, ">= 29"),
        ({"teacher": p.teacher[:1]}, {}, "2 samples"),
        ({"teacher": TopK(p.teacher, p.teacher)}, {}, "TopK holds"),
        ({"hidden": p.hidden[:, 1:]}, {}, "chunks.student is"),
        ({}, {"student_softcap": 0.0}, "student_softcap is 0.0"),
        ({}, {"temperature": 0.0}, "temperature is 0"),
        ({}, {"divergence": "backward"}, "divergence is 'backward'"),
        ({}, {"columns": torch.tensor([29])}, "ids from 29 to 29"),
        ({}, {"labels": torch.zeros(2, 8, dtype=torch.int64)}, "labels is"),
    ):
        with pytest.raises(ValueError, match=message):
            run(p._replace(**change), **options)
