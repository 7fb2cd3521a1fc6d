"""projection_kl's divergences, tail and labels: what they are by definition, on every backend."""

import math

import pytest
import torch
from projection_problems import DIVERGENCES, check, problem, run
from support import backends_of, each_backend_of, rerun_on

from chassis_kernels.chunks import Chunks
from chassis_kernels.projection_kl import projection_kl
from chassis_kernels.sparse import SparseProjection

backend = each_backend_of("projection_kl")


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


@pytest.mark.skipif("cpu" not in backends_of("projection_kl"), reason="the C++ extension is not built")
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set(isa):
    rerun_on(isa, __file__, "labels and not reference")
