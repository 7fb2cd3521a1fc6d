"""Helpers of several test files: documents, tiny models, live tensor memory, other instruction sets, rows far apart."""

import mmap
import os
import subprocess
import sys
import weakref

import pytest
import torch
from chassis.adapter import Adapter
from chassis.closed_form import closed_form
from chassis.experts import ModelExpert
from chassis.fit import Base
from chassis.models import inspect_head, vocabulary_hash
from chassis.probes import Probe, make_windows
from chassis.statistics import Statistics
from chassis.text.corpus import Document
from hypothesis import HealthCheck, settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chassis_kernels import backends

HALF = (torch.bfloat16, torch.float16)
BUDGET = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
WORDS = "the quick brown fox jumps over lazy dog def return x in class self import for if".split()
LAYOUTS = {  # of logits [N, V], the values unchanged but for `expanded`
    "contiguous": lambda t: t,
    "transposed": lambda t: t.T.contiguous().T,
    "part of a wider head": lambda t: torch.cat([t, t + 1], 1)[:, : t.shape[1]],
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "expanded": lambda t: t[:1].expand_as(t),
}


def documents(n: int, length: int = 60, seed: int = 0) -> list[Document]:
    """n different texts of `length` words."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for i in range(n):
        picks = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        texts.append(f"{seed} {i} " + " ".join(WORDS[k] for k in picks))
    return [Document(f"{seed}-{i}", text, "test") for i, text in enumerate(texts)]


def splits(n_fit: int = 24) -> dict[str, list[Document]]:
    return {"fit": documents(n_fit, seed=1), "validation": documents(4, seed=2), "test": documents(4, seed=3)}


def near(model: torch.nn.Module, make, scale: float = 0.02, **options) -> torch.nn.Module:
    """A copy of `model` with all weights moved a little: an expert of the same lineage."""
    other = make(**options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for target, source in zip(other.parameters(), model.parameters(), strict=True):
            noise = torch.randn(source.shape, generator=generator).to(source.dtype)
            target.copy_(source + scale * source.float().std().nan_to_num(1.0).to(source.dtype) * noise * 10)
    return other


def pair(make, tokenizer, architecture: str = "llama", **options) -> tuple[Base, ModelExpert]:
    """A random base of width 32 and an expert near it."""
    options = {"tie_word_embeddings": False, **options}
    model = make(architecture, **options)
    expert = near(model, lambda **o: make(architecture, **options))
    return Base(model, tokenizer, "base"), ModelExpert(expert, inspect_head(expert), "expert")


def fitted(base: Base, expert: ModelExpert, tokenizer, rank: int = 6, columns: int | None = None) -> Adapter:
    """The closed form of `rank` on a few documents."""
    statistics = Statistics(base.readout, expert.readout)
    for rows in Probe(base.model, expert).batches(make_windows(documents(20), tokenizer, length=48)):
        statistics.update(rows)
    adapter = closed_form(statistics).adapter(rank, columns)
    adapter.config.base, adapter.config.vocabulary_hash = "base", vocabulary_hash(tokenizer)
    return adapter


def logged(results: dict, name: str) -> list[float]:
    """What a distillation logged under `name`, in order."""
    return [entry[name] for entry in results["history"] if name in entry]


def backends_of(op: str) -> list[str]:
    """Those that take CPU tensors here, the reference first."""
    return [name for name in ("reference", "cpu", "triton") if not backends.why_not(op, name, "cpu")]


def each_backend_of(op: str):
    """A fixture `backend`: the test runs once on each of `backends_of(op)`."""

    @pytest.fixture(params=backends_of(op))
    def backend(request):
        with backends.use_backend(request.param):
            yield request.param

    return backend


def each_op(*names: str, without: tuple[str, ...] = ()):
    """The test runs for each op `name` of these on each `backend` of its own, which a fixture of that name selects."""
    pairs = [(name, backend) for name in names for backend in backends_of(name) if backend not in without]
    return pytest.mark.parametrize(("name", "backend"), pairs, indirect=["backend"], ids=map("-".join, pairs))


def rerun_on(isa: str, file: str, claims: str) -> None:
    """Run the tests of `file` that -k `claims` names with the C++ kernels of another instruction set."""
    ours = backends.cpu_isa()
    if ours == isa or (isa == "avx2" and ours == "portable"):
        pytest.skip("this session ran it, or this processor cannot")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", claims, file],
        env=os.environ | {"CHASSIS_CPU_ISA": isa, "MALLOC_PERTURB_": "128"},  # fresh memory holds 3e38, not 0
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def far_apart(rows: torch.Tensor) -> torch.Tensor:
    """The same rows [N, W], 2^30 elements from each other, in memory that is reserved but not filled."""
    apart, itemsize = 2**30, rows.element_size()
    size = (apart * (len(rows) - 1) + rows.shape[1]) * itemsize
    no_reserve = 0x4000  # MAP_NORESERVE on Linux
    space = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    strided = torch.frombuffer(space, dtype=rows.dtype).as_strided(rows.shape, (apart, 1))
    return strided.copy_(rows)


class LiveMemory(TorchDispatchMode):
    """Bytes of tensor storage made inside the block and alive at once (`peak`), and the largest shapes made (`shapes`)."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.known, self.shapes = 0, 0, set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.shapes.add(tuple(tensor.shape))
                self._track(tensor.untyped_storage())
        return out

    def _track(self, storage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size
