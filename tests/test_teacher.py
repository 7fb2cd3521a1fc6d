"""Every form of a teacher, reduced to columns in tiles, against the [B, T, V] logits that it stands for."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import LiveMemory

from chassis_kernels import Chunks, TeacherBatch, TeacherConfig, XTokenConfig, projection_kl, token_kl, xtoken_loss
from chassis_kernels import teacher as module
from chassis_kernels.reference import teacher as reference
from chassis_kernels.reference.projection_kl import top_columns
from chassis_kernels.sparse import SparseProjection, take_columns
from chassis_kernels.teacher import TeacherHead, TopK, check_teacher, compact

BUDGET = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
FORMS = ("logits", "head", "top-k")


def make(form, b=2, t=5, v=40, m=6, seed=0, dtype=torch.float32, head=8):
    """A teacher of v tokens; the head is wider than that, and a top-k has empty places."""
    g = torch.Generator().manual_seed(seed)
    if form == "logits":
        return (3 * torch.randn(b, t, v + 3, generator=g)).to(dtype)
    if form == "head":
        hidden, weight, bias = (torch.randn(shape, generator=g) for shape in ((b, t, head), (v + 3, head), (v + 3,)))
        return TeacherHead(hidden.to(dtype), weight.to(dtype), bias.to(dtype), 6.0 if seed % 2 else None)
    log_probs = torch.log_softmax(3 * torch.randn(b, t, v, generator=g), -1)
    m = min(m, v)
    log_probs, ids = log_probs.topk(m, -1)
    ids = torch.where(torch.rand(b, t, m, generator=g) < 0.2, -1, ids)
    return TopK(log_probs.to(dtype), ids)


@given(
    form=st.sampled_from(FORMS),
    b=st.integers(0, 2),
    t=st.integers(0, 9),
    v=st.integers(1, 70),
    m=st.integers(0, 70),
    k=st.integers(1, 80),
    masked=st.booleans(),
    tail=st.booleans(),
    temperature=st.sampled_from([1.0, 2.0, 0.5]),
    tile=st.sampled_from([1, 4096, 1 << 24]),
    seed=st.integers(0, 99),
)
@BUDGET
def test_equals_the_materialised_logits(form, b, t, v, m, k, masked, tail, temperature, tile, seed):
    teacher = make(form, b, t, v, m, seed, torch.float64)
    full = reference.logits(teacher, v)
    mask = torch.rand(b, t, generator=torch.Generator().manual_seed(seed)) < 0.6 if masked else None
    before, module.TILE_BYTES = module.TILE_BYTES, tile
    try:
        columns, logits = compact(teacher, v, k, temperature=temperature, tail=tail, column_mask=mask)
    finally:
        module.TILE_BYTES = before
    want = top_columns(full.flatten(0, 1), None if mask is None else mask.flatten(), k)
    assert torch.equal(columns, want)
    torch.testing.assert_close(logits[..., : len(columns)], full[..., columns], rtol=1e-12, atol=1e-12)
    assert logits.shape == (b, t, len(columns) + tail)
    if tail:
        others = torch.ones(v, dtype=torch.bool)
        others[columns] = False
        rest = torch.where(others, full / temperature, -torch.inf).logsumexp(-1)
        torch.testing.assert_close(logits[..., -1], temperature * rest, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_columns_can_be_given_in_any_order_and_repeat(form):
    teacher, columns = make(form), torch.tensor([7, 3, 39, 3])
    found = compact(teacher, 40, 5, columns=columns)
    assert torch.equal(found.columns, columns)
    torch.testing.assert_close(found.logits, reference.logits(teacher, 40)[..., columns])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_it_is(form, dtype):
    teacher = make(form, dtype=dtype)
    columns, logits = compact(teacher, 40, 9)
    assert logits.dtype == torch.float32 and not logits.requires_grad
    torch.testing.assert_close(logits, reference.logits(teacher, 40)[..., columns].float())


def test_a_top_k_that_lists_all_mass_leaves_a_little():
    listed = torch.tensor([[[0.75, 0.5]]]).log()  # rounding can take the sum beyond 1
    full = reference.logits(TopK(listed, torch.tensor([[[2, 0]]])), 4)
    assert torch.isclose(full[0, 0, 1], torch.tensor(0.5e-10).log()) and full.isfinite().all()
    everything = TopK(torch.full((1, 1, 4), 0.25).log(), torch.tensor([[[3, 0, 1, 2]]]))
    assert torch.equal(compact(everything, 4, 4, tail=True).logits[..., -1], torch.tensor([[-torch.inf]]))


def test_a_top_k_is_a_distribution():
    full = reference.logits(make("top-k", dtype=torch.float64), 40)
    torch.testing.assert_close(full.exp().sum(-1), torch.ones(2, 5, dtype=torch.float64))


@pytest.mark.parametrize("form", ["head", "top-k"])
@pytest.mark.parametrize("tail", [False, True])
def test_no_tensor_of_all_logits_is_made(form, tail, monkeypatch):
    monkeypatch.setattr(module, "TILE_BYTES", 4 * 60 * 64)
    teacher = make(form, 3, 20, 5000, 8)
    with LiveMemory() as live:
        compact(teacher, 5000, 100, tail=tail)
    assert max(torch.Size(shape).numel() for shape in live.shapes) < 60 * 5000 / 4
    assert live.peak < 4 * 60 * 5000 / 2


def test_autocast_changes_nothing():
    teacher = make("head")
    plain = compact(teacher, 40, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compact(teacher, 40, 9).logits, plain.logits)


def test_columns_of_a_projection_can_be_taken_out():
    g = torch.Generator().manual_seed(0)
    projection = SparseProjection(torch.randint(-1, 9, (12, 3), generator=g), torch.rand(12, 3, generator=g), 9)
    columns = torch.tensor([4, 0, 8])
    view = take_columns(projection.columns, columns)
    dense = torch.zeros(12, 3)
    for j in range(3):
        entries = slice(int(view.start[j]), int(view.start[j + 1]))
        dense[:, j].index_add_(0, view.rows[entries].long(), view.weights[entries])
    torch.testing.assert_close(dense, projection.dense()[:, columns])


def aligned(b=2, t=5, v_s=30, v_t=40, c=4):
    """Student logits, a projection and chunks for `make`'s teachers."""
    g = torch.Generator().manual_seed(1)
    projection = SparseProjection(torch.randint(-1, v_t, (v_s, 3), generator=g), torch.rand(v_s, 3, generator=g), v_t)
    ids = [torch.randint(-1, c, (b, t), generator=g) for _ in range(2)]
    return 2 * torch.randn(b, t, v_s, generator=g), projection, Chunks(*ids, torch.ones(b, c, dtype=torch.bool))


def gradient(loss_of, student):
    leaf = student.detach().clone().requires_grad_()
    loss = loss_of(leaf)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("form", ["head", "top-k"])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
@pytest.mark.parametrize("tail", [False, True])
def test_projection_kl_takes_any_form(form, divergence, tail):
    teacher, (student, projection, chunks) = make(form), aligned()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    labels = torch.full((2, 5), 7)
    options = {
        "divergence": divergence,
        "tail": tail,
        "temperature": 2.0,
        "vocab_topk": 12,
        "column_mask": mask,
        "labels": labels,
    }
    found, stats = projection_kl(student, teacher, projection, chunks, **options)
    want, other = projection_kl(student, reference.logits(teacher, 40), projection, chunks, **options)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    assert torch.equal(stats.columns, other.columns) and stats.accuracy == other.accuracy
    torch.testing.assert_close(stats.nll, other.nll)
    grads = [
        gradient(lambda z, t=t, b=buffer: projection_kl(z, t, projection, chunks, **options, **b)[0], student)[1]
        for t in (teacher, reference.logits(teacher, 40))
        for buffer in ({}, {"label_weight": torch.zeros(2, 5), "grad_buffer": torch.empty_like(student)})
    ]
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", FORMS[1:])
def test_token_kl_of_any_form_writes_its_gradient_into_a_buffer(form):
    teacher, student = make(form), torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[1.0, 0.5, 0, 1, 1], [1, 1, 1, 0, 0]])

    def result(leaf, **options):
        loss = token_kl(leaf, teacher, mask, vocab_topk=9, temperature=1.5, n_tokens=6, **options)
        return loss.detach(), torch.autograd.grad(3 * loss, leaf)[0]

    loss, right = result(student.requires_grad_())
    buffer = torch.full_like(student, torch.nan)
    for place in (buffer, student.detach().clone()):
        leaf = student if place is buffer else place.requires_grad_()
        again, grad = result(leaf, grad_buffer=place)
        assert grad.data_ptr() == place.data_ptr() and torch.equal(again, loss)
        torch.testing.assert_close(grad, right, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["head", "top-k"])
def test_token_kl_takes_any_form_within_its_top_columns(form):
    teacher, student = make(form), aligned(v_s=40)[0]
    mask, options = torch.ones(2, 5), {"temperature": 2.0, "n_tokens": 10}
    full = reference.logits(teacher, 40)
    for reverse in (False, True):
        (loss, grad), (want, right) = (
            gradient(lambda z, t=t, r=reverse: token_kl(z, t, mask, vocab_topk=9, reverse=r, **options), student)
            for t in (teacher, full)
        )
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, right, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="needs vocab_topk"):
        token_kl(student, teacher, mask, **options)


@pytest.mark.parametrize("form", ["head", "top-k"])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_xtoken_loss_takes_any_form(form, same, eager):
    size = 40 if same else 30
    student, projection, chunks = aligned(v_s=size)
    teacher, given = make(form), () if same else (projection, chunks)
    config = XTokenConfig(size, (TeacherConfig(40, same_tokenizer=same),), vocab_topk=11)
    rest = {"input_ids": torch.full((2, 5), 3), "token_mask": torch.ones(2, 5)}
    batches = [TeacherBatch(t, *given) for t in (teacher, reference.logits(teacher, 40))]
    losses = [xtoken_loss(student, [batch], config, **rest, eager=eager)[0] for batch in batches]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"gold_loss": True}, "gold_loss"),
        ({"kd_loss_mode": "select_teacher"}, "kd_loss_mode='select_teacher'"),
        ({"kd_loss_mode": "averaged_logits"}, "kd_loss_mode='averaged_logits'"),
        ({"sum_weights_metric": "entropy"}, "sum_weights_metric='entropy'"),
    ],
)
def test_xtoken_loss_names_what_needs_whole_logits(options, named):
    student, projection, chunks = aligned()
    config = XTokenConfig(30, (TeacherConfig(40),), **options)
    rest = {"input_ids": torch.full((2, 5), 3), "token_mask": torch.ones(2, 5)}
    for form, kind in (("head", "TeacherHead"), ("top-k", "TopK")):
        with pytest.raises(ValueError, match=f"teacher 0 is a {kind}, but {named} needs"):
            xtoken_loss(student, [TeacherBatch(make(form), projection, chunks)], config, **rest)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (torch.zeros(2, 3, 4), "expected .B, T, >= 5."),
        (TeacherHead(torch.zeros(2, 3, 4), torch.zeros(4, 4)), r">= 5, D"),
        (TeacherHead(torch.zeros(2, 3, 4), torch.zeros(5, 3)), r"weight \(5, 3\)"),
        (TeacherHead(torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(4)), r"bias has shape \(4,\)"),
        (TeacherHead(torch.zeros(2, 3, 4), torch.zeros(5, 4), None, 0.0), "softcap is 0.0"),
        (TopK(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)), "ids torch.float32"),
        (TopK(torch.zeros(2, 3, 4), torch.full((2, 3, 4), 5)), "from 5 to 5, with 5 teacher tokens"),
        ([1.0], "the teacher is a list"),
    ],
)
def test_what_does_not_fit_is_refused(teacher, message):
    with pytest.raises(ValueError, match=message):
        check_teacher(teacher, 5)
    for form in FORMS:
        assert check_teacher(make(form), 40) == (2, 5)
