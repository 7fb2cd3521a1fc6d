"""projection_kl: every backend against float64 autograd through the eager definition; the contract of the op."""

import pytest
import torch
from hypothesis import given
from projection_problems import DIVERGENCES, DRAWN, check, check_drawn, problem, run, truth
from support import BUDGET, HALF, backends_of, each_backend_of, rerun_on

from benchmarks.timing import peak_bytes
from chassis_kernels import backends
from chassis_kernels.chunks import Chunks
from chassis_kernels.projection_kl import projection_kl
from chassis_kernels.sparse import SparseProjection

HAVE = backends_of("projection_kl")
backend = each_backend_of("projection_kl")
COMPILED = [b for b in HAVE if b != "triton"]  # as against interpreted, which takes long for wide shapes
OPS = ("projection_kl", "projection_kl_backward", "projection_kl_", "top_columns")
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", COMPILED)
@given(drawn=DRAWN)
@BUDGET
def test_value_and_gradient(name, drawn):
    with backends.use_backend(name):
        check_drawn(**drawn)


@pytest.mark.parametrize("backend", COMPILED, indirect=True)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shape", [(1, 40, 45, 3000, 2500, 4, 30, 700), (2, 33, 20, 1024, 5000, 2, 9, 4999)])
def test_wide_vocabularies(shape, divergence, backend):
    for dtype in (torch.float32, torch.bfloat16):
        check(problem(*shape, divergence=divergence, temperature=1.5).to(dtype))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradcheck(divergence, tail, temperature):
    options = {"divergence": divergence, "tail": tail, "temperature": temperature}
    p = problem(2, 5, 6, 9, 8, 2, 4, 5, scale=1.0, labelled=True, **options).to(torch.float64)

    def loss(z):
        value, stats = projection_kl(z, p.teacher, p.projection, p.chunks, **p.options)
        return value, stats.nll

    assert torch.autograd.gradcheck(loss, p.student.requires_grad_())


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, backend):
    arguments = backends.OPS[name].example("cpu")
    if name == "projection_kl":
        arguments = (arguments[0].requires_grad_(), *arguments[1:])
    torch.library.opcheck(getattr(torch.ops.chassis, name).default, arguments)


def test_upstream_gradients(backend):
    p = problem(sample_mask=torch.tensor([0.25, 1.5]), denominator=3)
    loss, _, grad = check(p)
    through = run(p, upstream=lambda x: (x / 8).exp())[2]
    torch.testing.assert_close(through, (loss / 8).exp() / 8 * grad, rtol=1e-5, atol=1e-9)
    buffer = torch.full_like(p.student, torch.nan)
    scaled = run(p, upstream=lambda x: -3 * x, grad_buffer=buffer)[2]
    torch.testing.assert_close(scaled, -3 * grad, rtol=1e-5, atol=1e-9)


def test_second_backward_is_exact(backend):
    p = problem()
    student = p.student.requires_grad_()
    loss, _ = projection_kl(student, p.teacher, p.projection, p.chunks, **p.options)
    first = torch.autograd.grad(loss, student, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, student)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"labelled": True}, {"labelled": True, "temperature": 2.0, "tail": True}], ids=str)
def test_gradient_into_a_buffer_and_over_the_logits(options, dtype, backend):
    p = problem(v_s=77, **options).to(dtype)
    before = p.student.clone()
    loss, _, grad = run(p)
    assert torch.equal(p.student, before)
    buffer = torch.full_like(p.student, torch.nan)
    head = p.student.clone().requires_grad_()
    student = head * 1.0
    again, _ = projection_kl(student, p.teacher, p.projection, p.chunks, **p.options, grad_buffer=buffer)
    again.backward(retain_graph=True)
    torch.testing.assert_close(head.grad, grad)
    torch.testing.assert_close(again.detach(), loss)
    with pytest.raises(RuntimeError, match="one backward"):
        again.backward()
    head.grad = None
    student = head * 1.0
    place = student.data_ptr()
    projection_kl(student, p.teacher, p.projection, p.chunks, **p.options, grad_buffer=student)[0].backward()
    assert student.data_ptr() == place
    torch.testing.assert_close(head.grad, grad)
    torch.testing.assert_close(student.detach(), grad)


def test_buffer_is_left_alone_without_gradients(backend):
    p = problem()
    buffer = torch.ones_like(p.student)
    with torch.no_grad():
        projection_kl(p.student.requires_grad_(), p.teacher, p.projection, p.chunks, **p.options, grad_buffer=buffer)
    assert (buffer == 1).all()
    with pytest.raises(ValueError, match="grad_buffer is torch.float32"):
        projection_kl(p.student, p.teacher, p.projection, p.chunks, **p.options, grad_buffer=buffer[:1])
    labels = torch.zeros(2, 9, dtype=torch.int64)
    with pytest.raises(ValueError, match="need a label_weight"):
        projection_kl(p.student, p.teacher, p.projection, p.chunks, labels=labels, grad_buffer=buffer)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_offsets(offset, backend):
    p = problem()
    check(p._replace(student=p.student + offset, teacher=p.teacher + offset))


def test_minus_infinity(backend):
    p = problem(topk=29)
    p.student[:, :, ::3] = -torch.inf
    p.teacher[:, :, 1::4] = -torch.inf
    loss, _, grad = run(p)
    floor = p._replace(student=p.student.clamp_min(-1e4), teacher=p.teacher.clamp_min(-1e4))
    right_loss, _, right = truth(floor)
    torch.testing.assert_close(loss.double(), right_loss, rtol=1e-5, atol=0)
    assert (grad.double() - right).norm() <= 1e-5 * right.norm()


def test_minus_infinity_in_whole_blocks(backend):
    p = problem(v_s=5000, v_t=300, topk=100)
    p.student[:, :, :4500] = -torch.inf
    loss, _, grad = run(p)
    right_loss, _, right = truth(p)
    torch.testing.assert_close(loss.double(), right_loss, rtol=1e-5, atol=0)
    assert (grad.double() - right).norm() <= 1e-5 * right.norm()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_knows(divergence, backend):
    """p near 1 on both sides: the gradient is small and must not be rounding noise."""
    p = problem(v_s=29, divergence=divergence)
    p = p._replace(projection=SparseProjection(torch.arange(29)[:, None], torch.ones(29, 1), 29))
    p.student[..., 3] += 20
    p.teacher[..., 3] += 20
    check(p)


def test_underflow_and_rows_without_projected_mass(backend):
    p = problem()
    p.student[..., :20] += 200
    ids = p.projection.indices.clone()
    ids[:20] = -1
    check(p._replace(projection=SparseProjection(ids, p.projection.weights, 29)))
    check(p._replace(projection=SparseProjection(torch.full_like(ids, -1), p.projection.weights, 29)))


def test_heads_wider_than_their_tokenizers(backend):
    p = problem()
    loss, stats, grad = run(p)
    wide = [torch.cat([t, torch.full((*t.shape[:2], 5), 70.0)], 2) for t in (p.student, p.teacher)]
    wide_loss, wide_stats, wide_grad = run(p._replace(student=wide[0], teacher=wide[1]))
    torch.testing.assert_close(wide_loss, loss)
    assert torch.equal(stats.columns, wide_stats.columns)
    torch.testing.assert_close(wide_grad[..., :37], grad)
    assert not wide_grad[..., 37:].any()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_top_columns_take_the_lowest_ids_of_ties(dtype, backend):
    for seed, keep in ((0, None), (1, torch.rand(6, generator=torch.Generator().manual_seed(3)) < 0.5)):
        teacher = torch.randint(-9, 3, (6, 500), generator=torch.Generator().manual_seed(seed)).to(dtype)
        teacher[::2] = torch.where(teacher[::2] == 0, -0.0, teacher[::2])  # equal to 0
        rows = teacher if keep is None else teacher[keep]
        order = sorted(range(500), key=lambda j: (-float(rows[:, j].max()), j))
        for k in (1, 7, 499, 500, 600):
            found = torch.ops.chassis.top_columns(teacher, keep, k)
            assert found.tolist() == sorted(order[:k])
    nothing = torch.ops.chassis.top_columns(teacher, torch.zeros(6, dtype=torch.bool), 3)
    assert nothing.tolist() == [0, 1, 2]


def test_column_mask_keeps_padding_out(backend):
    p = problem(topk=5)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[:, -3:] = False
    p.options["column_mask"] = mask
    check(p)
    wild = p.teacher.clone()
    wild[:, -3:, ::2] += 100
    assert torch.equal(run(p)[1].columns, run(p._replace(teacher=wild))[1].columns)


def test_columns_can_be_given_in_any_order(backend):
    p = problem()
    _, stats, grad = run(p)
    loss, _, shuffled = run(p, columns=stats.columns.flip(0))
    torch.testing.assert_close(shuffled, grad, rtol=1e-5, atol=1e-8)


NO_COLUMNS = torch.empty(0, dtype=torch.int64)


@pytest.mark.parametrize(
    "empty",
    [{"b": 0}, {"t_s": 0}, {"t_t": 0}, {"k": 0}, {"sample_mask": torch.zeros(2)}, {"columns": NO_COLUMNS}],
    ids=str,
)
def test_nothing_to_compare(empty, backend):
    loss, stats, grad = run(problem(**empty))
    assert loss.isfinite() and grad.isfinite().all()
    if "k" not in empty and "columns" not in empty:
        assert loss == 0 and stats.valid_pairs == 0
        assert not grad.any()


def test_no_chunk_slots(backend):
    chunks = Chunks(torch.full((2, 9), -1), torch.full((2, 11), -1), torch.zeros(2, 0, dtype=torch.bool))
    loss, _, grad = run(problem()._replace(chunks=chunks))
    assert loss == 0 and not grad.any()


def test_rows_outside_chunks_have_zero_gradient_in_a_poisoned_buffer(backend):
    p = problem()
    p.chunks.student[0] = -1
    _, _, grad = run(p, grad_buffer=torch.full_like(p.student, torch.nan))
    assert not grad[0].any() and grad[1].isfinite().all()


@pytest.mark.parametrize("backend", COMPILED, indirect=True)
def test_threads_do_not_change_a_bit(backend):
    p = problem(2, 40, 40, 900, 800, 3, 20, 300)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss, _, grad = run(p)
            found.append((loss, grad))
    finally:
        torch.set_num_threads(before)
    if backend == "cpu":
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.skipif("cpu" not in HAVE, reason="the C++ extension is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_beside_the_gradient_is_a_tenth_of_the_logits(dtype):
    p = problem(1, 256, 256, 32000, 20000, 4, 150, 4096, labelled=True).to(dtype)
    p.projection.columns  # noqa: B018 - kept by the projection
    before, unit, buffer = torch.get_num_threads(), 4 * p.student.numel(), torch.zeros_like(p.student)
    try:
        torch.set_num_threads(2)
        fresh = -(-buffer.nbytes // (2 << 20)) * (2 << 20)  # its gradient lies in whole pages of 2 MiB
        peaks = [peak_bytes(lambda: run(p), CPU) - fresh, peak_bytes(lambda: run(p, grad_buffer=buffer), CPU)]
    finally:
        torch.set_num_threads(before)
    assert max(peaks) <= 0.1 * unit, peaks


def test_autocast(backend):
    p = problem()
    loss, _, grad = run(p)
    with torch.autocast("cpu", torch.bfloat16):
        cast_loss, _, cast_grad = run(p)
    assert torch.equal(loss, cast_loss) and torch.equal(grad, cast_grad)


def test_compiled_without_graph_breaks(backend):
    torch._dynamo.reset()
    p = problem()

    def step(student, teacher, chunks):
        return projection_kl(student, teacher, p.projection, chunks, vocab_topk=12)[0]

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    grads = []
    for f in (step, compiled):
        student = p.student.clone().requires_grad_()
        f(student, p.teacher, p.chunks).backward()
        grads.append(student.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.skipif("cpu" not in HAVE, reason="the C++ extension is not built")
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set(isa):
    rerun_on(isa, __file__, "(wide or buffer or minus_infinity or top_columns or poisoned) and not reference")


def test_what_does_not_fit_is_refused():
    p = problem()
    student, teacher, projection, chunks, _ = p
    for arguments, options, message in (
        ((student[0], teacher, projection, chunks), {}, "student_logits are"),
        ((student[..., :36], teacher, projection, chunks), {}, ">= 37"),
        ((student, teacher[..., :28], projection, chunks), {}, ">= 29"),
        ((student, teacher[:1], projection, chunks), {}, "2 samples and teacher_logits 1"),
        ((student.long(), teacher, projection, chunks), {}, "torch.int64"),
        ((student[:, 1:], teacher, projection, chunks), {}, "chunks.student is"),
        ((student, teacher, projection, chunks._replace(student=chunks.student + 1)), {}, "holds id 5"),
        ((student, teacher, projection, chunks._replace(valid=chunks.valid.float())), {}, "chunks.valid is"),
        ((student, teacher, projection, chunks), {"temperature": 0.0}, "temperature is 0"),
        ((student, teacher, projection, chunks), {"vocab_topk": 0}, "vocab_topk is 0"),
        ((student, teacher, projection, chunks), {"sample_mask": torch.ones(3)}, "sample_mask has shape"),
        ((student, teacher, projection, chunks), {"column_mask": torch.ones(2, 11)}, "column_mask is"),
        ((student, teacher, projection, chunks), {"columns": torch.tensor([29])}, "ids from 29 to 29"),
        ((student, teacher, projection, chunks), {"divergence": "jeffreys"}, "expected one of forward, reverse, js"),
        ((student, teacher, projection, chunks), {"labels": torch.full((2, 9), 37)}, "labels hold ids from 37 to 37"),
        ((student, teacher, projection, chunks), {"labels": torch.zeros(2, 9)}, "labels is torch.float32"),
        ((student, teacher, projection, chunks), {"label_weight": torch.ones(2, 9)}, "no labels"),
    ):
        with pytest.raises(ValueError, match=message):
            projection_kl(*arguments, **options)
