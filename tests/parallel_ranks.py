"""What each process of test_parallel.py does: every case on the whole problem, then on this rank's share of it."""

from __future__ import annotations

import contextlib
import functools
import json
import traceback
import unittest.mock
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import test_xtoken_loss as golden
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from chassis_kernels.backends import use_backend
from chassis_kernels.chunks import Chunks, next_token
from chassis_kernels.gold_kl import gold_kl
from chassis_kernels.parallel.groups import ONE_RANK, Parallel
from chassis_kernels.parallel.next_token import next_token_nll
from chassis_kernels.projection_kl import projection_kl
from chassis_kernels.sparse import SparseProjection
from chassis_kernels.teacher import TeacherHead, TopK
from chassis_kernels.token_kl import token_kl
from chassis_kernels.xtoken_loss import xtoken_loss

TENSORS = load_file(golden.DATA / "xtoken_loss.safetensors")
SHAPES = ((1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2))  # vocabulary and sequence ranks
STUDENT, TEACHER = 37, 29  # tokens
HEADS = 41, 31  # columns
POSITIONS = 9, 11
CUTS = {2: (30, 41), 3: (5, 38, 41)}  # of three slabs the last holds padding only


class Problem(NamedTuple):
    student: torch.Tensor  # [2, 9, 41]
    teacher: torch.Tensor  # [2, 11, 31]
    same: torch.Tensor  # [2, 9, 41] logits of a teacher with the student's tokenizer
    projection: SparseProjection
    chunks: Chunks
    labels: torch.Tensor  # [2, 9]
    sample_mask: torch.Tensor  # [2]
    votes: torch.Tensor  # [2, 11] bool
    mask: torch.Tensor  # [2, 9]


class Share(NamedTuple):
    """Which part a rank holds."""

    columns: slice
    student: list[int]
    teacher: list[int]

    def of(self, p: Problem) -> Problem:
        chunks = p.chunks.shift()
        student, teacher = chunks.student[:, self.student], chunks.teacher[:, self.teacher]
        return p._replace(
            student=p.student[:, self.student, self.columns].clone(),
            teacher=p.teacher[:, self.teacher],
            same=p.same[:, self.student],
            chunks=chunks._replace(student=student, teacher=teacher),
            labels=p.labels[:, self.student],
            votes=p.votes[:, self.teacher],
            mask=p.mask[:, self.student],
        )


def problem(seed: int = 0, dtype: torch.dtype = torch.float64, valid: float = 0.8) -> Problem:
    g = torch.Generator().manual_seed(seed)
    b, c, (t_s, t_t) = 2, 5, POSITIONS
    ids = torch.randint(-1, TEACHER, (STUDENT, 3), generator=g)
    weights = torch.rand(STUDENT, 3, generator=g)
    ids[::4, 1:], weights[::4, 0] = -1, 1.0
    chunks = Chunks(
        torch.randint(-1, c, (b, t_s), generator=g).sort(1).values,
        torch.randint(-1, c, (b, t_t), generator=g).sort(1).values,
        torch.rand(b, c, generator=g) < valid,
        torch.rand(b, c, generator=g) < 0.7,
    )
    student, same = (3 * torch.randn(b, t_s, HEADS[0], generator=g) for _ in range(2))
    teacher = 3 * torch.randn(b, t_t, HEADS[1], generator=g)
    student[..., STUDENT:] += 20  # padding that would drown everything
    return Problem(
        student.to(dtype),
        teacher.to(dtype),
        same.to(dtype),
        SparseProjection(ids, weights, TEACHER),
        chunks,
        next_token(torch.randint(0, STUDENT, (b, t_s), generator=g), -1),
        torch.tensor([1.0, 0.5]),
        torch.rand(b, t_t, generator=g) < 0.8,
        torch.rand(b, t_s, generator=g).round(decimals=1),
    )


def place_for(student: torch.Tensor, buffer: bool) -> dict:
    """The keyword argument that has the gradient written to a buffer."""
    contiguous = torch.contiguous_format
    return {"grad_buffer": torch.full_like(student, torch.nan, memory_format=contiguous)} if buffer else {}


# Each loss: a problem, or a share of one with its groups, to (loss, statistics).
def projection(p: Problem, parallel: Parallel, buffer: bool = False, **options):
    options = {"vocab_topk": 12, "sample_mask": p.sample_mask, "column_mask": p.votes} | options
    options |= place_for(p.student, buffer)
    loss, stats = projection_kl(p.student, p.teacher, p.projection, p.chunks, parallel=parallel, **options)
    return loss, list(stats[:4])


def as_head(logits: torch.Tensor) -> TeacherHead:
    return TeacherHead(logits, torch.eye(logits.shape[2], dtype=logits.dtype))


def as_top_k(logits: torch.Tensor) -> TopK:
    return TopK(*torch.log_softmax(logits, 2).topk(6, 2))


def compact_projection(p: Problem, parallel: Parallel, form: Callable, **options):
    return projection(p._replace(teacher=form(p.teacher[..., :TEACHER])), parallel, **options)


def compact_token(p: Problem, parallel: Parallel, form: Callable, buffer: bool = False, **options):
    student, parallel = parallel.cut(p.student, STUDENT)
    options = {"vocab_topk": 9, "column_mask": p.mask > 0.3, "temperature": 1.5} | options | place_for(student, buffer)
    return token_kl(student, form(p.same[..., :STUDENT]), p.mask, n_tokens=7.0, parallel=parallel, **options), []


def projection_and_labels(p: Problem, parallel: Parallel, buffer: bool = False, **options):
    options = {"labels": p.labels, "label_weight": p.mask, "vocab_topk": 12} | options | place_for(p.student, buffer)
    loss, stats = projection_kl(p.student, p.teacher, p.projection, p.chunks, parallel=parallel, **options)
    assert not (buffer and stats.nll.requires_grad)
    rows = [(stats.nll.detach() ** 2).sum(), *([] if buffer else [stats.correct.sum()])]
    return loss, [*stats[:4], *map(parallel.sequence_sum, rows)]


def gold(p: Problem, parallel: Parallel, buffer: bool = False, **options):
    student, parallel = parallel.cut(p.student, STUDENT)
    options = {"sample_mask": p.sample_mask} | options | place_for(student, buffer)
    loss, metrics = gold_kl(student, p.teacher, p.projection, p.chunks, parallel=parallel, **options)
    return loss, list(metrics.values())


def token(p: Problem, parallel: Parallel, buffer: bool = False, **options):
    student, parallel = parallel.cut(p.student, STUDENT)
    options |= place_for(student, buffer)
    return token_kl(student, p.same[..., :STUDENT], p.mask, n_tokens=7.0, parallel=parallel, **options), []


def next_token_loss(p: Problem, parallel: Parallel):
    student, parallel = parallel.cut(p.student, STUDENT)
    if not parallel.sharded:
        log_p = torch.log_softmax(student, 2)
        nll = torch.where(p.labels >= 0, -log_p.gather(2, p.labels.clamp_min(0)[..., None])[..., 0], 0.0)
        right = student.argmax(2) == p.labels
    else:
        nll, right = next_token_nll(student, p.labels, parallel)
    return parallel.sequence_sum((nll * p.mask).sum()), [parallel.sequence_sum(right.sum())]


class Case(NamedTuple):
    name: str
    run: Callable
    options: dict
    seed: int = 0
    valid: float = 0.8
    split: str = "zigzag"  # how the positions are spread
    even: bool = False  # slabs as torch.chunk cuts them
    dtype: torch.dtype = torch.float64


def cases() -> list[Case]:
    found = []
    for reverse in (False, True):
        way = "reverse" if reverse else "forward"
        found += [
            Case(f"projection_kl {way}", projection, {"divergence": way, "temperature": 1.5}),
            Case(f"projection_kl {way} all columns", projection, {"divergence": way, "vocab_topk": 99}, 1, even=True),
            Case(f"gold_kl {way}", gold, {"reverse": reverse, "temperature": 1.5}, 2),
            Case(f"gold_kl {way} relaxed", gold, {"reverse": reverse, "relaxed": True, "uncommon_topk": 4}, 3, even=True),
            Case(f"token_kl {way}", token, {"reverse": reverse, "vocab_topk": 9, "temperature": 2.0}, 4),
            Case(f"token_kl {way} all tokens", token, {"reverse": reverse}, 5, even=True),
        ]
    exact = {"exact_only": True, "sample_mask": None, "column_mask": None}
    found += [
        Case("projection_kl exact", projection, exact, 6, split="halves"),
        Case("gold_kl exact", gold, {"exact_only": True, "sample_mask": None}, 7, split="halves"),
        Case("projection_kl js", projection, {"divergence": "js"}, 11),
        Case("projection_kl with tail", projection, {"tail": True, "temperature": 2.0}, 12),
        Case("projection_kl js with tail and labels", projection_and_labels, {"tail": True, "divergence": "js"}, 13),
        Case("projection_kl with labels", projection_and_labels, {}, 14, split="halves", even=True),
        Case("next_token_nll", next_token_loss, {}, 8),
    ]
    for run in (projection, gold, token, next_token_loss):
        found.append(Case(f"{run.__name__}: one rank holds everything", run, {}, 9, split="first"))
    for form in (as_head, as_top_k):
        found += [
            Case(f"projection_kl {form.__name__}", compact_projection, {"form": form, "temperature": 1.5}, 16),
            Case(f"projection_kl {form.__name__} tail", compact_projection, {"form": form, "tail": True}, 17, split="first"),
            Case(f"token_kl {form.__name__}", compact_token, {"form": form}, 18, even=True),
            Case(f"token_kl reverse {form.__name__}", compact_token, {"form": form, "reverse": True}, 19, split="first"),
        ]
    for run, options in (
        (projection, {}),
        (projection_and_labels, {}),
        (gold, {}),
        (token, {"vocab_topk": 9}),
        (compact_projection, {"form": as_head}),
        (compact_token, {"form": as_top_k}),
    ):
        found.append(Case(f"{run.__name__} into a buffer", run, options | {"buffer": True}, 20))
    for run in (projection, gold):
        found.append(Case(f"{run.__name__}: nothing is valid", run, {}, 10, valid=0.0))
    for dtype in (torch.float32, torch.bfloat16):
        for run in (projection_and_labels, gold, token, next_token_loss):
            options = {} if run is next_token_loss else {"temperature": 1.5}
            found.append(Case(f"{run.__name__} in {dtype}", run, options, 15, even=True, dtype=dtype))
    return found


def positions(split: str, n: int, rank: int, ranks: int) -> list[int]:
    if ranks == 1 or (split == "first" and rank == 0):
        return list(range(n))
    if split == "first":
        return []
    if split == "halves":
        return list(range(n * rank // ranks, n * (rank + 1) // ranks))
    outer = [i for i in range(n) if i < n // 4 or i >= n - n // 4]
    return outer if rank == 0 else [i for i in range(n) if i not in outer]


def slab(rank: int, ranks: int, even: bool, width: int = HEADS[0], cuts: tuple[int, ...] = ()) -> slice:
    if ranks == 1 or even:
        size = -(-width // ranks)
        return slice(rank * size, min((rank + 1) * size, width))
    cuts = (0, *(cuts or CUTS[ranks]))
    return slice(cuts[rank], cuts[rank + 1])


def result(case: Case, p: Problem, parallel: Parallel):
    """Loss, statistics and gradient of twice the loss."""
    student = p.student.detach().requires_grad_()
    loss, stats = case.run(p._replace(student=student), parallel, **case.options)
    (grad,) = torch.autograd.grad(2 * loss, student, retain_graph=True)
    if case.options.get("buffer"):  # which is handed over once
        return loss.detach(), stats, grad
    (again,) = torch.autograd.grad(2 * loss, student)
    torch.testing.assert_close(again, grad, rtol=0, atol=0)
    return loss.detach(), stats, grad


def share_of(case: Case, vocab, sequence) -> tuple[Share, Parallel]:
    columns = slab(vocab.rank(), vocab.size(), case.even)
    spread = (positions(case.split, n, sequence.rank(), sequence.size()) for n in POSITIONS)
    return Share(columns, *spread), Parallel(vocab, sequence, HEADS[0], None if case.even else columns.start)


def check(case: Case, vocab, sequence) -> None:
    """Raises where this rank's loss, statistics or gradient are not those of one process; to the bit with groups of one."""
    whole = problem(case.seed, valid=case.valid)
    share, parallel = share_of(case, vocab, sequence)
    loss, stats, grad = result(case, share.of(whole), parallel)
    right, right_stats, right_grad = result(case, whole, ONE_RANK)
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if parallel.sharded else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(loss, right, **tolerance)
    for got, wanted in zip(stats, right_stats, strict=True):
        torch.testing.assert_close(got, wanted, **tolerance)
    torch.testing.assert_close(grad, right_grad[:, share.student, share.columns], **tolerance)


def check_rounding(case: Case, vocab, sequence) -> None:
    """Raises where the error against float64 is more than twice that of the eager expression in the logits' dtype."""
    whole = problem(case.seed, case.dtype)
    share, parallel = share_of(case, vocab, sequence)
    loss, _, grad = result(case, share.of(whole), parallel)
    with use_backend("reference"):
        eager_loss, _, eager = result(case, whole, ONE_RANK)
        logits = {name: getattr(whole, name).double() for name in ("student", "teacher", "same")}
        right_loss, _, right = result(case, whole._replace(**logits), ONE_RANK)
    assert grad.dtype == case.dtype and loss.dtype == torch.float32
    assert abs(loss - right_loss) <= 2 * abs(eager_loss - right_loss) + 1e-6 * (1 + right_loss)
    eager, right = (t[:, share.student, share.columns].double() for t in (eager, right))
    assert (grad.double() - right).norm() <= 2 * (eager - right).norm() + 4e-7 * right.norm()


# xtoken_loss: number of a golden case, and what it stands for.
STEPS = {
    3: "p_kl, dynamic scaling",
    5: "p_kl reverse, exact, dynamic scaling",
    11: "h-kl",
    18: "same tokenizer reverse",
    17: "averaged logits",
    46: "averaged logits of different tokenizers",
    22: "gold and same tokenizer",
    23: "weights by ce, normalised by vocabulary",
    48: "weights by entropy",
    24: "weights by max_prob",
    71: "selected teacher",
}


def step(number: int, compat: bool):
    """Logits, teachers, configuration and other arguments of a golden case in float64; by default with a padded head."""
    logits, teachers, config, rest = golden.problem(golden.CASES[number], TENSORS, compat=compat)
    if not compat:
        logits = torch.cat([logits, torch.full_like(logits[..., :3], 30.0)], 2)
    return logits.double(), [t._replace(logits=t.logits.double()) for t in teachers], config, rest


def check_step(number: int, compat: bool, vocab, sequence) -> None:
    """Raises where xtoken_loss of this rank's share of a batch is not that of the batch."""
    logits, teachers, config, rest = step(number, compat)
    whole = logits.clone().requires_grad_()
    right, right_metrics = xtoken_loss(whole, teachers, config, **rest)
    right.backward()

    width = logits.shape[2]
    columns = slab(vocab.rank(), vocab.size(), False, width, (5, 38, width) if vocab.size() == 3 else (17, width))
    mine = positions("zigzag", logits.shape[1], sequence.rank(), sequence.size())
    labels = torch.where(next_token(rest["token_mask"]) != 0, next_token(rest["input_ids"]), -1)[:, mine]
    shares = []
    for teacher in teachers:
        own = positions("zigzag", teacher.logits.shape[1], sequence.rank(), sequence.size())
        share = teacher._replace(logits=teacher.logits[:, own])
        if teacher.chunks is not None:
            chunks = teacher.chunks.shift()
            share = share._replace(chunks=chunks._replace(student=chunks.student[:, mine], teacher=chunks.teacher[:, own]))
        if teacher.input_ids is not None:
            counted = next_token(teacher.token_mask) != 0
            its_labels = torch.where(counted, next_token(teacher.input_ids), -1)[:, own]
            share = share._replace(input_ids=None, token_mask=teacher.token_mask[:, own], labels=its_labels)
        shares.append(share)
    logits = logits[:, mine, columns].clone().requires_grad_()
    loss, metrics = xtoken_loss(
        logits,
        shares,
        config,
        token_mask=rest["token_mask"][:, mine],
        sample_mask=rest["sample_mask"],
        labels=labels,
        global_valid_tokens=rest["global_valid_tokens"],
        parallel=Parallel(vocab, sequence, width, columns.start),
    )
    loss.backward()
    tolerance = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(loss, right, **tolerance)
    assert set(metrics) == set(right_metrics)
    for name, value in right_metrics.items():
        torch.testing.assert_close(metrics[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(logits.grad, whole.grad[:, mine, columns], **tolerance)


def checks() -> dict[str, Callable]:
    """All there is to do for a vocabulary group and a sequence group."""
    found = {}
    for case in cases():
        found[case.name] = functools.partial(check if case.dtype == torch.float64 else check_rounding, case)
    for number, name in STEPS.items():
        for compat in (False, True):
            found[f"xtoken_loss: {name}{', compat' if compat else ''}"] = functools.partial(check_step, number, compat)
    return found


def no_collectives():
    return unittest.mock.patch.multiple(dist, all_reduce=None, all_gather=None)


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    world = max(a * b for a, b in SHAPES)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, rank=rank, world_size=world, timeout=timedelta(seconds=30))
    failures = {}
    for n_vocab, n_sequence in SHAPES:
        table = torch.arange(n_vocab * n_sequence).view(n_sequence, n_vocab)
        vocab = [dist.new_group(row.tolist()) for row in table]
        sequence = [dist.new_group(column.tolist()) for column in table.T]
        if rank >= table.numel():
            continue
        place, slab_of = divmod(rank, n_vocab)
        with no_collectives() if table.numel() == 1 else contextlib.nullcontext():
            for name, run in checks().items():
                try:
                    run(vocab[place], sequence[slab_of])
                except Exception:
                    failures[f"{n_vocab}x{n_sequence} {name}"] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(failures))
    dist.barrier()
    dist.destroy_process_group()
