"""The losses on sharded logits, against one process: values, statistics and gradients, over real gloo processes."""

import json
import time

import pytest
import torch
from parallel_ranks import SHAPES, checks, main, problem
from support import LiveMemory

from chassis_kernels import (
    Chunks,
    Parallel,
    SparseProjection,
    TeacherBatch,
    TeacherConfig,
    XTokenConfig,
    projection_kl,
    token_kl,
    xtoken_loss,
)

LIMIT = 150  # seconds; a deadlock ends here


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """What went wrong on any rank, by shape and case; all shapes and cases in one set of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = max(a * b for a, b in SHAPES)
    processes = torch.multiprocessing.spawn(main, (str(folder),), nprocs=ranks, join=False)
    end = time.monotonic() + LIMIT
    while not processes.join(timeout=1):
        if time.monotonic() > end:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"the ranks did not finish within {LIMIT} s")
    reports = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {name: f"rank {rank}: {error}" for rank, report in enumerate(reports) for name, error in report.items()}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("name", checks())
def test_sharded_equals_whole(name, shape, failures):
    name = f"{shape[0]}x{shape[1]} {name}"
    assert name not in failures, failures[name]


class Group:
    """A process group as far as checks look at it."""

    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


def test_slabs_are_cut_like_torch_chunk():
    for width, ranks in ((41, 3), (40, 2), (7, 3), (5, 4)):
        parts = torch.arange(width).chunk(ranks)
        for rank in range(ranks):
            part = parts[rank] if rank < len(parts) else torch.empty(0)
            found = Parallel(Group(rank, ranks), vocab_size=width).slab(part[None])
            assert list(found) == part.tolist()


def test_slabs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="needs vocab_size"):
        Parallel(Group(0, 2))
    with pytest.raises(ValueError, match="rank 1 of 3 holds 13 of 41 columns, expected 14"):
        Parallel(Group(1, 3), vocab_size=41).slab(torch.empty(2, 13))
    with pytest.raises(ValueError, match="columns 30 to 42 are not within a head of 41"):
        Parallel(Group(1, 3), vocab_size=41, vocab_start=30).slab(torch.empty(2, 13))


def test_what_a_part_of_a_sequence_cannot_know_is_asked_for():
    p, parallel = problem(), Parallel(sequence=Group(0, 2))
    with pytest.raises(ValueError, match="must be shifted"):
        projection_kl(p.student, p.teacher, p.projection, p.chunks, parallel=parallel)
    config = XTokenConfig(41, (TeacherConfig(41, same_tokenizer=True),))
    with pytest.raises(ValueError, match="labels are missing: a sharded sequence needs them"):
        xtoken_loss(p.student, [TeacherBatch(p.same)], config, token_mask=p.mask, input_ids=p.labels, parallel=parallel)


def test_whole_logits_only():
    p, parallel = problem(), Parallel(sequence=Group(0, 2))
    config = XTokenConfig(41, (TeacherConfig(41, same_tokenizer=True),))
    with pytest.raises(ValueError, match="eager=True is for logits that are whole"):
        options = {"token_mask": p.mask, "labels": p.labels, "eager": True, "parallel": parallel}
        xtoken_loss(p.student, [TeacherBatch(p.same)], config, **options)


@pytest.mark.parametrize("name", ["projection_kl", "token_kl"])
def test_memory_is_the_gradient_and_tiles(name, monkeypatch):
    """Neither forward nor backward holds the size of the logits besides the gradient: a fifth of it is left for tiles."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)
    rows, width = 1024, 4000
    g = torch.Generator().manual_seed(0)
    student = torch.randn(1, rows, width, generator=g, requires_grad=True)
    parallel = Parallel(Group(0, 2), vocab_size=2 * width)
    teacher = torch.randn(1, rows, 2 * width, generator=g)
    ids = torch.arange(rows)[None] // 8
    chunks = Chunks(ids, ids, torch.ones(1, rows // 8, dtype=torch.bool))
    projection = SparseProjection(torch.arange(2 * width)[:, None], torch.ones(2 * width, 1), 2 * width)
    with LiveMemory() as memory:
        if name == "projection_kl":
            loss, _ = projection_kl(student, teacher, projection, chunks, vocab_topk=100, parallel=parallel)
        else:
            loss = token_kl(student, teacher, torch.ones(1, rows), vocab_topk=100, n_tokens=rows, parallel=parallel)
        loss.backward()
    given = sum(t.nbytes for t in (student, teacher) if (t.untyped_storage()._cdata in memory.known))
    assert memory.peak - given <= 1.2 * student.nbytes
