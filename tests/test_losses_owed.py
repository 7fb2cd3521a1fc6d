"""The same claims of every loss and backend: offsets, buffers, accumulation, extremes, ignored samples, layouts, memory."""

import pytest
import torch
from loss_problems import EPS, check, make, run
from projection_problems import LAYOUTS
from support import backends_of, each_op, far_apart

from benchmarks.timing import peak_bytes
from chassis_kernels import backends, use_backend

LOGIT_LOSSES = ("projection_kl", "gold_kl", "token_kl")
STUDENTS = (*LOGIT_LOSSES, "linear_projection_kl")
LOSSES = (*STUDENTS, "linear_kl")
INTO = ("projection_kl_", "gold_kl_", "token_kl_", "linear_projection_kl_backward", "linear_kl_backward")


@pytest.fixture
def backend(request):
    with use_backend(request.param):
        yield request.param


def example(name):
    """The example of an op, and the same with the rows of every matrix 2^30 elements apart."""
    near = [t.clone() if isinstance(t, torch.Tensor) else t for t in backends.OPS[name].example("cpu")]
    far = [far_apart(t) if isinstance(t, torch.Tensor) and t.dim() == 2 else t for t in near]
    return near, far


def rows_far_apart_are_reached(name):
    near, far = example(name)
    op = getattr(torch.ops.chassis, name)
    for found, right in zip((op(*far), far), (op(*near), near), strict=True):
        found, right = ((t,) if isinstance(t, torch.Tensor) else t for t in (found, right))
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True) if isinstance(a, torch.Tensor))


@each_op(*INTO, without=("reference", "triton"))
def test_rows_far_apart_are_reached(name, backend):
    """Offsets past 2^31 in inputs and results."""
    rows_far_apart_are_reached(name)


@pytest.mark.skipif("triton" not in backends_of("linear_projection_kl_backward"), reason="no interpreter")
@pytest.mark.parametrize("name", ["projection_kl_", "linear_projection_kl_backward"])
def test_interpreted_rows_far_apart_are_reached(name, int32_overflow_stops):
    with use_backend("triton"):
        rows_far_apart_are_reached(name)


@each_op(*LOSSES)
def test_a_producer_upstream(name, backend):
    case = make(name)
    through = case._replace(
        op=lambda leaves, *rest: case.op(tuple(t.tanh() for t in leaves), *rest),
        definition=lambda leaves, *rest: case.definition(tuple(t.tanh() for t in leaves), *rest),
    )
    check(through)
    exponential = case._replace(
        leaves=(case.leaves[0] / 3, *case.leaves[1:]),
        op=lambda leaves, *rest: case.op((leaves[0].exp(), *leaves[1:]), *rest),
        definition=lambda leaves, *rest: case.definition((leaves[0].exp(), *leaves[1:]), *rest),
    )
    check(exponential)


@each_op(*LOGIT_LOSSES)
@pytest.mark.parametrize("produce", [torch.exp, torch.tanh])
def test_a_buffer_over_what_a_graph_still_needs_is_refused(name, produce, backend):
    """autograd sees the write, into the logits themselves or into another graph's tensor."""
    case = make(name)
    logits = produce(case.leaves[0].requires_grad_())
    loss = case.op((logits,), case.teacher, case.where, grad_buffer=logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    other = produce(torch.randn_like(case.leaves[0]).requires_grad_())
    case.op((case.leaves[0] * 1,), case.teacher, case.where, grad_buffer=other).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.sum().backward()


@each_op(*LOSSES, without=("triton",))
def test_error_is_flat_in_the_number_of_rows_and_chunks(name, backend):
    """Nothing is summed in the inputs' bfloat16."""
    errors = []
    options = {"uncommon_topk": 0} if name == "gold_kl" else {}  # equal logits leave the others' order open
    for t, c in ((16, 2), (16, 15), (400, 2), (400, 40), (400, 399)):
        case = make(name, 1, t, c=c, ordered=True).to(torch.bfloat16)
        loss, grads = run(case.op, case, **options)
        right_loss, right = run(case.definition, case.to(torch.float64), **options)
        assert abs(loss - right_loss) <= 8 * EPS * abs(right_loss)
        errors.append([(a - b).norm() / b.norm() for a, b in zip(grads, right, strict=True)])
    for few, other, *many in zip(*errors, strict=True):
        assert max(many) <= 1.5 * max(few, other)


@each_op(*STUDENTS)
@pytest.mark.parametrize(("distance", "dtype"), [(1e-3, torch.float32), (1e-3, torch.bfloat16), (1.0, torch.float32)])
def test_a_student_that_nearly_is_its_teacher_and_is_nearly_certain(name, distance, dtype, backend):
    case = make(name, shared=True)
    if name == "linear_projection_kl":
        hidden, weight, bias = case.leaves
        logits = hidden @ weight.T + bias
        bias[3] += 20
    else:
        logits = case.leaves[0].clone()
        case.leaves[0][..., 3] += 20
    width = case.teacher[0].shape[-1]
    teacher = torch.randn(*logits.shape[:2], width, generator=torch.Generator().manual_seed(1)) * distance
    teacher[..., : logits.shape[-1]] += logits
    teacher[..., 3] += 20
    check(case._replace(teacher=(teacher,)).to(dtype))


@each_op(*STUDENTS)
@pytest.mark.parametrize("reverse", [False, True])
def test_minus_infinity_among_the_students_logits(name, reverse, backend):
    """As logits that are very low; without any mass where the teacher has some, token_kl and a pair of gold_kl are infinite
    and keep the gradient."""
    case = make(name, shared=True)
    logits = case.leaves[-1]  # or their bias
    logits[..., ::3] = -torch.inf
    options = {"divergence": "reverse" if reverse else "forward"} if "projection" in name else {"reverse": reverse}
    loss, grads = run(case.op, case, **options)
    low = case._replace(leaves=(*case.leaves[:-1], logits.clamp_min(-1e4))).to(torch.float64)
    right_loss, right = run(case.definition, low, **options)
    infinite = name in ("gold_kl", "token_kl") and not reverse
    torch.testing.assert_close(loss.double(), right_loss + torch.inf if infinite else right_loss, rtol=1e-5, atol=0)
    for found, want in zip(grads, right, strict=True):
        assert (found - want).norm() <= 1e-5 * want.norm()


def without(case, samples):
    """The case with these samples ignored, and the case of the others alone."""
    kept = [i for i in range(len(case.leaves[0])) if i not in samples]
    batched = [t.dim() == 3 for t in case.leaves]
    alone = [t[kept] if many else t for t, many in zip(case.leaves, batched, strict=True)]
    teacher = tuple(t[kept] for t in case.teacher)
    if isinstance(case.where, torch.Tensor):
        mask = case.where.clone()
        mask[samples] = 0
        return case._replace(where=mask), case._replace(leaves=tuple(alone), teacher=teacher, where=case.where[kept])
    student, valid = case.where.student.clone(), case.where.valid.clone()
    student[samples[:1]], valid[samples[1:]] = -1, False
    ignored = case.where._replace(student=student, valid=valid)
    rest = case.where._replace(
        student=case.where.student[kept], teacher=case.where.teacher[kept], valid=case.where.valid[kept]
    )
    return case._replace(where=ignored), case._replace(leaves=tuple(alone), teacher=teacher, where=rest)


@each_op(*STUDENTS)
@pytest.mark.parametrize("samples", [[], [0, 2], [0, 1, 2]], ids=str)
def test_ignored_samples_do_not_count_and_are_not_read(name, samples, backend):
    case, rest = without(make(name, 3), samples)
    if name in LOGIT_LOSSES:
        case.leaves[0][samples] = torch.nan
    loss, grads = run(case.op, case)
    assert not grads[0][samples].any()
    if len(samples) == 3:
        assert loss == 0 and not any(g.any() for g in grads)
        return
    right_loss, right = run(rest.op, rest)
    torch.testing.assert_close(loss, right_loss, rtol=1e-6, atol=0)
    kept = [i for i in range(3) if i not in samples]
    for found, want in zip(grads, right, strict=True):
        torch.testing.assert_close(found[kept] if found.dim() == 3 else found, want, rtol=1e-5, atol=1e-7)


@each_op("gold_kl", "token_kl")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_of_logits(name, layout, dtype, backend):
    case = make(name).to(dtype)
    of = LAYOUTS[layout]
    check(case._replace(leaves=(of(case.leaves[0]),), teacher=(of(case.teacher[0]),)))


@each_op("linear_projection_kl")
def test_expanded_hidden_states_and_weights(name, backend):
    case = make(name)
    for changed in range(3):
        leaves = list(case.leaves)
        leaves[changed] = leaves[changed][:1].expand_as(leaves[changed])
        check(case._replace(leaves=tuple(leaves), teacher=(case.teacher[0][:1].expand_as(case.teacher[0]),)))


@each_op("gold_kl", "token_kl")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(name, dtype, backend):
    case = make(name).to(dtype)
    plain = run(case.op, case)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(case.op, case)
        leaves = [t.detach().requires_grad_() for t in case.leaves]
        loss = case.op(leaves, case.teacher, case.where)
    outside = torch.autograd.grad(loss, leaves)
    for value, grads in (found, (loss, outside)):
        assert torch.equal(value, plain[0]) and all(map(torch.equal, grads, plain[1]))


@each_op(*STUDENTS)
def test_only_the_student_has_a_gradient_and_none_without_grad(name, backend):
    case = make(name)
    right_loss, right = run(case.op, case)
    teacher = tuple(t.clone().requires_grad_() for t in case.teacher)
    assert not case.op(case.leaves, teacher, case.where).requires_grad
    with torch.no_grad():
        leaves = tuple(t.clone().requires_grad_() for t in case.leaves)
        assert torch.equal(case.op(leaves, teacher, case.where), right_loss)
    loss = case.op(leaves, teacher, case.where)
    loss.backward()
    assert all(t.grad is None for t in teacher)
    assert torch.equal(loss, right_loss) and all(torch.equal(t.grad, g) for t, g in zip(leaves, right, strict=True))


@each_op("projection_kl", "linear_projection_kl")
@pytest.mark.parametrize("single", [False, True])
def test_a_column_named_twice_counts_twice(name, single, backend):
    check(make(name, single=single), columns=torch.tensor([4, 4, 9, 20, 4, 0]))


@pytest.mark.parametrize("name", ["gold_kl", "token_kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_beside_the_gradient_is_a_part_of_the_logits(name, dtype):
    if "cpu" not in backends_of(name):
        pytest.skip("the C++ extension is not built")
    case = make(name, 1, 256, 32000, c=150, ordered=True).to(dtype)
    before, unit, buffer = torch.get_num_threads(), 4 * case.leaves[0].numel(), torch.zeros_like(case.leaves[0])
    try:
        torch.set_num_threads(2)
        with use_backend("cpu"):
            fresh = peak_bytes(lambda: run(case.op, case), torch.device("cpu")) - buffer.nbytes
            into = peak_bytes(lambda: run(case.op, case, grad_buffer=buffer), torch.device("cpu"))
    finally:
        torch.set_num_threads(before)
    assert max(fresh, into) <= 0.3 * unit, (fresh / unit, into / unit)
