"""projection_kl: every backend against float64 autograd through the eager definition; the contract of the op."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import rerun_on

from benchmarks.timing import peak_bytes
from chassis_kernels import backends
from chassis_kernels.chunks import Chunks
from chassis_kernels.projection_kl import projection_kl
from chassis_kernels.reference import projection_kl as reference
from chassis_kernels.sparse import SparseProjection

HAVE = [b for b in ("reference", "cpu", "triton") if not backends.why_not("projection_kl", b, "cpu")]
COMPILED = [b for b in HAVE if b != "triton"]  # as against interpreted, which takes long for wide shapes
OPS = ("projection_kl", "projection_kl_backward", "projection_kl_", "top_columns")
CPU = torch.device("cpu")
DIVERGENCES = reference.DIVERGENCES
HALF = (torch.bfloat16, torch.float16)
BUDGET = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(params=HAVE)
def backend(request):
    with backends.use_backend(request.param):
        yield request.param


class Problem(NamedTuple):
    student: torch.Tensor
    teacher: torch.Tensor
    projection: SparseProjection
    chunks: Chunks
    options: dict

    def to(self, dtype):
        return self._replace(student=self.student.to(dtype), teacher=self.teacher.to(dtype))


def problem(b=2, t_s=9, t_t=11, v_s=37, v_t=29, k=3, c=5, topk=12, seed=0, scale=3.0, labelled=False, **options):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, v_t, (v_s, k), generator=g)
    projection = SparseProjection(ids, torch.rand(v_s, k, generator=g), v_t)
    chunks = Chunks(
        torch.randint(-1, c, (b, t_s), generator=g),
        torch.randint(-1, c, (b, t_t), generator=g),
        torch.rand(b, c, generator=g) < 0.8,
        torch.rand(b, c, generator=g) < 0.7,
    )
    student = scale * torch.randn(b, t_s, v_s, generator=g)
    teacher = scale * torch.randn(b, t_t, v_t, generator=g)
    if labelled:  # some labels count for nothing, some rows have none
        options["labels"] = torch.randint(-1, v_s, (b, t_s), generator=g)
        options["label_weight"] = torch.randn(b, t_s, generator=g) * (torch.rand(b, t_s, generator=g) < 0.7)
    return Problem(student, teacher, projection, chunks, {"vocab_topk": topk, **options})


def run(p, upstream=None, **more):
    """Loss, stats and gradient (of upstream(loss), by default the loss) by the op."""
    student = p.student.detach().requires_grad_()
    loss, stats = projection_kl(student, p.teacher, p.projection, p.chunks, **p.options, **more)
    (loss if upstream is None else upstream(loss)).backward()
    return loss.detach(), stats, student.grad


def truth(p, dtype=torch.float64, columns=None):
    """The same by autograd through the eager definition, in float64 unless told."""
    student = p.student.detach().to(dtype).requires_grad_()
    options = p.options | ({} if columns is None else {"columns": columns})
    loss, stats = reference.loss(student, p.teacher.to(dtype), p.projection, p.chunks, **options)
    grad = torch.autograd.grad(loss, student)[0] if loss.requires_grad else torch.zeros_like(student)
    return loss.detach(), stats, grad


def check(p, **more):
    """The numerical contract: at most twice the error of the eager expression in the input dtype."""
    loss, stats, grad = run(p, **more)
    right_loss, right_stats, right = truth(p, columns=stats.columns)
    eager_loss, _, eager = truth(p, torch.float32, columns=stats.columns)
    assert torch.equal(stats.columns, truth(p)[1].columns)
    assert grad.dtype == p.student.dtype and loss.dtype == torch.float32
    eager_error = (eager.to(p.student.dtype).double() - right).norm()
    assert (grad.double() - right).norm() <= 2 * eager_error + 4e-7 * right.norm() + 1e-7  # of terms of size 1 that cancel
    assert abs(loss - right_loss) <= 2 * abs(eager_loss - right_loss) + 2e-6 * (1 + abs(right_loss))
    assert stats.valid_pairs == right_stats.valid_pairs
    torch.testing.assert_close(stats.chunk_kl.double(), right_stats.chunk_kl, rtol=2e-5, atol=1e-5)
    return loss, stats, grad


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "part of a wider head": lambda t: torch.cat([t, t + 1], 2)[..., : t.shape[2]],
    "every other row": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda t: t[:1].expand_as(t),
}


DRAWN = st.fixed_dictionaries(
    {
        "b": st.integers(1, 3),
        "t": st.tuples(st.integers(1, 12), st.integers(1, 12)),
        "v": st.tuples(st.integers(1, 150), st.integers(1, 150)),
        "k": st.integers(0, 4),
        "c": st.integers(1, 6),
        "topk": st.integers(1, 160),
        "dtypes": st.tuples(*[st.sampled_from([torch.float32, *HALF])] * 2),
        "layouts": st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 2),
        "seed": st.integers(0, 99),
        "labelled": st.booleans(),
        "temperature": st.sampled_from([1.0, 2.0, 0.5]),
        "divergence": st.sampled_from(DIVERGENCES),
        "tail": st.booleans(),
        "exact_only": st.booleans(),
    }
)


def check_drawn(b, t, v, k, c, topk, dtypes, layouts, seed, **options):
    p = problem(b, *t, *v, k, c, topk, seed, **options)
    student = LAYOUTS[layouts[0]](p.student.to(dtypes[0]))
    check(p._replace(student=student, teacher=LAYOUTS[layouts[1]](p.teacher.to(dtypes[1]))))


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


def definition(p, divergence, tail):
    """KL of every chunk that has one, written out for one chunk after the other, in float64: [(slot, nats)]."""
    found, chunks = [], p.chunks
    dense = p.projection.dense().double()[:, p.options["columns"]]
    for b in range(len(p.student)):
        for c in range(chunks.valid.shape[1]):
            rows = [chunks.student[b, 1:] == c, chunks.teacher[b, 1:] == c]
            if not (chunks.valid[b, c] and rows[0].any() and rows[1].any()):
                continue
            a = p.student[b, :-1][rows[0]].double().softmax(1).mean(0) @ dense
            q = p.teacher[b, :-1][rows[1]].double()
            if tail:
                q = q.softmax(1)[:, p.options["columns"]]
                q = torch.cat([q, 1 - q.sum(1, keepdim=True)], 1).log().mean(0).exp()
                a = torch.cat([a, 1 - a.sum(0, keepdim=True)])
            else:
                q = q[:, p.options["columns"]].log_softmax(1).mean(0).exp()
            r = a / a.sum()
            if divergence == "js":
                q = q / q.sum()
                m = (r + q) / 2
                terms = (r * (r / m).log() + q * (q / m).log()) / 2
            else:
                terms = q * (q / r).log() if divergence == "forward" else r * (r / q).log()
            found.append((b * chunks.valid.shape[1] + c, float(terms.sum())))
    return found


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", [False, True])
def test_chunk_values_are_what_the_formulas_say(divergence, tail, backend):
    J = torch.tensor([1, 4, 5, 9, 20, 28])
    p = problem(t_s=15, t_t=15, scale=1.0, divergence=divergence, tail=tail, columns=J)
    ids = torch.cat([p.projection.indices, J.repeat(7)[:37, None]], 1)  # every row reaches J, and all of J
    weights = torch.cat([p.projection.weights, torch.ones(37, 1)], 1)
    p = p._replace(projection=SparseProjection(ids, weights / weights.where(ids >= 0, 0).sum(1, keepdim=True), 29))
    kl = run(p)[1].chunk_kl.flatten()
    wanted = definition(p, divergence, tail)
    assert len(wanted) > 3
    for slot, value in wanted:
        assert float(kl[slot]) == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_jensen_shannon_is_bounded_and_symmetric(backend):
    """Equal vocabularies, one position a chunk: the same value when the sides change places, log 2 when they never meet."""
    p = problem(1, 9, 9, 29, 29, c=8, topk=29, divergence="js")
    ids = torch.arange(-1, 8)[None]
    valid = torch.ones(1, 8, dtype=torch.bool)
    p = p._replace(
        projection=SparseProjection(torch.arange(29)[:, None], torch.ones(29, 1), 29), chunks=Chunks(ids, ids, valid)
    )
    kl = run(p)[1].chunk_kl
    torch.testing.assert_close(run(p._replace(student=p.teacher, teacher=p.student))[1].chunk_kl, kl, rtol=1e-5, atol=1e-7)
    assert (kl > 0).all() and (kl < math.log(2)).all()
    torch.testing.assert_close(run(p._replace(student=p.teacher))[1].chunk_kl, torch.zeros(1, 8), rtol=0, atol=1e-6)
    apart = p._replace(student=p.student.clone(), teacher=p.teacher.clone())
    apart.student[..., :15], apart.teacher[..., 15:] = -torch.inf, -torch.inf
    _, stats, grad = run(apart)
    torch.testing.assert_close(stats.chunk_kl, torch.full((1, 8), math.log(2)), rtol=1e-6, atol=0)
    assert grad.isfinite().all()


def test_tail_counts_what_lies_outside_the_columns(backend):
    """Two students that agree inside J and differ in how much they leave outside: only the tail tells them apart."""
    p = problem(1, 4, 4, 29, 29, c=2, columns=torch.arange(5))
    p = p._replace(projection=SparseProjection(torch.arange(29)[:, None], torch.ones(29, 1), 29))
    moved = p._replace(student=p.student.clone())
    moved.student[..., 5:] += 3
    p.chunks.valid[:] = True
    torch.testing.assert_close(run(p)[0], run(moved)[0], rtol=1e-5, atol=1e-6)
    p.options["tail"] = True
    assert run(p)[1].valid_pairs > 0 and abs(run(p)[0] - run(moved)[0]) > 0.01
    everything = p._replace(options={"columns": torch.arange(29)})
    inside, _, grad = check(everything)
    with_tail, _, same = run(everything._replace(options={"columns": torch.arange(29), "tail": True}))
    torch.testing.assert_close(with_tail, inside, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(same, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_labels_give_the_cross_entropy(dtype, temperature, backend):
    """nll of rows in and out of chunks, the share that is right, and gradients of nll and KD that arrive apart."""
    p = problem(v_s=77, temperature=temperature, labelled=True).to(dtype)
    p.chunks.student[0] = -1
    labels = p.options["labels"]
    p.student[0, 1, labels[0, 1]] = 90
    del p.options["label_weight"]
    student = p.student.detach().requires_grad_()
    loss, stats = projection_kl(student, p.teacher, p.projection, p.chunks, **p.options)
    exact = p.student.double().requires_grad_()
    right = torch.nn.functional.cross_entropy(exact.flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="none")
    torch.testing.assert_close(stats.nll.flatten().double(), right.detach(), rtol=1e-6, atol=2e-6)
    assert torch.equal(stats.correct, (labels >= 0) & (p.student.argmax(2) == labels)) and stats.correct[0, 1]
    upstream = torch.randn(right.shape, generator=torch.Generator().manual_seed(5))
    grad = torch.autograd.grad(stats.nll, student, upstream.view(labels.shape), retain_graph=True)[0]
    wanted = torch.autograd.grad(right, exact, upstream.double())[0]
    limit = 2e-6 if dtype == torch.float32 else 2**-8
    assert (grad.double() - wanted).norm() <= limit * wanted.norm()
    torch.testing.assert_close(
        torch.autograd.grad(loss, student)[0], run(p._replace(options={"temperature": temperature, "vocab_topk": 12}))[2]
    )


def test_a_label_that_is_nearly_certain_keeps_its_digits(backend):
    """p - 1 at the label is formed in fp32 and rounded once, also for bfloat16 logits."""
    for p_label in (0.9, 0.99, 0.999, 0.9999):
        student = torch.zeros(1, 2, 300)
        student[..., 7] = math.log(p_label / (1 - p_label) * 299)
        p = problem(1, 2, 3, 300, 29)._replace(student=student.bfloat16())
        p.options.update(labels=torch.full((1, 2), 7), label_weight=torch.ones(1, 2))
        p.chunks.valid[:] = False
        _, _, grad = run(p)
        wanted = -1 / (1 + (p.student[0, 0, 7].double() - math.log(299)).exp())
        assert abs(grad[0, 0, 7] - wanted) <= 2**-8 * abs(wanted) + 2e-7


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
        peaks = [peak_bytes(lambda: run(p), CPU) - buffer.nbytes, peak_bytes(lambda: run(p, grad_buffer=buffer), CPU)]
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
    rerun_on(isa, __file__, "(wide or buffer or labels or minus_infinity or top_columns or poisoned) and not reference")


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
