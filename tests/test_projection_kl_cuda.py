"""The CUDA kernels of projection_kl, compiled for the host: values, gradients and the hard inputs of test_projection_kl.py.

What this shows: the arithmetic, the indices and the barriers are right. What it cannot show: that it runs on a GPU, or fast.
"""

import contextlib
import ctypes
import importlib.util
import itertools
import shutil
import subprocess
import sysconfig
from pathlib import Path

import projection_problems as cases
import pytest
import test_projection_kl
import test_projection_kl_options
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from projection_problems import check, problem, run
from support import far_apart

from chassis_kernels import backends, cuda
from chassis_kernels.chunks import layout
from chassis_kernels.cuda import projection_kl as kernels
from chassis_kernels.projection_kl import cross_entropy
from chassis_kernels.reference import projection_kl as reference
from chassis_kernels.sparse import SparseProjection

ROOT = Path(__file__).parents[1]
OPS = ("projection_kl", "projection_kl_backward", "projection_kl_")
BUDGET = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROOM = 1 << 16  # bytes of shared memory


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    """The extension over kernels that g++ compiled for the host, and `emulate(processors, shared memory, reversed)`."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulation with")
    pybind11 = pytest.importorskip("pybind11")
    library = tmp_path_factory.mktemp("emulation") / "_CUDA.so"
    folders = ROOT / "tests/cuda_emulation", ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-DCHASSIS_CUDA_THREADS=64"]
    command += [f"-I{folder}" for folder in folders] + [ROOT / "tests/cuda_emulation/module.cpp", "-o", library]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    spec = importlib.util.spec_from_file_location("cuda_emulation._CUDA", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, ctypes.CDLL(str(library)).emulate


@pytest.fixture(scope="module")
def patched(emulation):
    """The op on CPU tensors through the CUDA backend's Python, whose extension is the emulation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_CUDA", emulation[0])
        patch.setattr(cuda, "stream_of", lambda device: contextlib.nullcontext(0))
        for name in OPS:
            implementation = backends.Implementation(getattr(kernels, name), backends.GPU_DTYPES, "emulated")
            patch.setitem(backends.OPS[name].implementations, "cpu", implementation)
        yield emulation[1]


@pytest.fixture
def device(patched):
    """emulate(processors, shared memory in bytes, reversed); every op on the emulated device."""
    patched(2, ROOM, False)
    with backends.use_backend("cpu"):
        yield patched


@pytest.fixture
def backend(device):
    """What the tests taken over from test_projection_kl.py ask for."""
    return "cuda"


TAKEN = (
    "test_chunk_values_are_what_the_formulas_say",
    "test_jensen_shannon_is_bounded_and_symmetric",
    "test_tail_counts_what_lies_outside_the_columns",
    "test_labels_give_the_cross_entropy",
    "test_a_label_that_is_nearly_certain_keeps_its_digits",
    "test_upstream_gradients",
    "test_second_backward_is_exact",
    "test_gradient_into_a_buffer_and_over_the_logits",
    "test_large_offsets",
    "test_minus_infinity",
    "test_minus_infinity_in_whole_blocks",
    "test_a_student_that_knows",
    "test_underflow_and_rows_without_projected_mass",
    "test_heads_wider_than_their_tokenizers",
    "test_columns_can_be_given_in_any_order",
    "test_nothing_to_compare",
    "test_no_chunk_slots",
    "test_rows_outside_chunks_have_zero_gradient_in_a_poisoned_buffer",
)
_FOUND = vars(test_projection_kl) | vars(test_projection_kl_options)
globals().update({name: _FOUND[name] for name in TAKEN})


@given(drawn=cases.DRAWN, machine=st.sampled_from([(1, ROOM, False), (3, ROOM, True), (2, 1300, False), (2, 300, True)]))
@BUDGET
def test_value_and_gradient(device, drawn, machine):
    """Also where the chip has no room for the tokens' means (1300 bytes), nor for a and Q (300 bytes)."""
    device(*machine)
    cases.check_drawn(**drawn)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wide_vocabulary(dtype, device):
    p = problem(1, 12, 13, 3001, 2500, 4, 5, 700, temperature=1.5, labelled=True).to(dtype)
    buffer = torch.full_like(p.student, torch.nan)
    assert torch.equal(check(p)[2], check(p, grad_buffer=buffer)[2])


@pytest.mark.parametrize("tail", [False, True])
def test_rows_far_apart_are_reached(tail, device):
    """Offsets past 2^31 in logits and gradient, which is written over them."""
    p = problem(1, 4, 4, 60, 29, labelled=True).to(torch.bfloat16)
    p.chunks.valid[:] = True
    plan, labels = layout(p.chunks, None, False, torch.float32), p.options["labels"]
    arguments = reference.op_arguments(p.student, p.teacher, p.projection, plan, torch.arange(9), labels, (1.0, 0, tail))
    weights = torch.ones(5), torch.ones(4)
    student, teacher, near = far_apart(arguments[0]), far_apart(arguments[1]), arguments[0].clone()
    far = torch.ops.chassis.projection_kl_(student, *weights, student, teacher, *arguments[2:])
    right = torch.ops.chassis.projection_kl_(near, *weights, near, *arguments[1:])
    assert all(map(torch.equal, far, right)) and torch.equal(student, near) and student.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_the_order_of_threads_nor_the_memory_used_changes_a_bit(dtype, device):
    """Sums are gathered in one order whatever runs first; where they are kept does not matter."""
    p = problem(2, 12, 12, 333, 90, 4, 5, 60, labelled=True, temperature=1.5, tail=True).to(dtype)
    found = []
    for machine in ((1, ROOM, False), (5, ROOM, True), (2, 1300, False), (2, 300, True)):
        device(*machine)
        loss, stats, grad = run(p)
        found.append((loss, stats.chunk_kl, stats.nll, grad))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_repeated_columns(device):
    """Each repeat is an outcome of its own; they share their entries."""
    for columns in ([3, 3, 3, 8, 1, 8], [0] * 70 + [5]):
        for tail in (False, True):
            check(problem(columns=torch.tensor(columns), tail=tail, labelled=True))


def test_a_column_with_many_entries(device):
    """One that a warp has to share, beside some that it need not."""
    p = problem(v_s=700, v_t=50, topk=40)
    ids = p.projection.indices.clone()
    ids[:400, 0], ids[100:164, 1] = 7, 9
    p = p._replace(projection=SparseProjection(ids, p.projection.weights, 50))
    assert p.projection.columns.start.diff().max() >= 400
    check(p)


def test_duplicate_entries_of_a_row_add_up(device):
    p = problem(k=3, topk=29)
    ids = p.projection.indices.clone()
    ids[:, 1] = ids[:, 2] = ids[:, 0]
    check(p._replace(projection=SparseProjection(ids, p.projection.weights, 29)))


def test_cross_entropy_alone(device):
    """No chunks, no columns and no projection."""
    logits = 3 * torch.randn(2, 5, 45, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, -1, 39, 7, 7], [-1, 1, 2, 3, 4]])
    logits.requires_grad_()
    nll, correct = cross_entropy(logits, labels, 40)
    right = torch.nn.functional.cross_entropy(
        logits[..., :40].flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="none"
    )
    torch.testing.assert_close(nll.flatten(), right, rtol=1e-6, atol=1e-6)
    assert torch.equal(correct, logits[..., :40].argmax(2) == labels)
    grad, wanted = (torch.autograd.grad(t.exp().sum(), logits)[0] for t in (nll, right))
    torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-6)


def test_the_self_checks_of_the_ops_hold(device):
    for name in OPS:
        found, wanted = backends.OPS[name].example("cpu"), backends.OPS[name].example("cpu")
        got = getattr(torch.ops.chassis, name)(*found)
        with backends.use_backend("reference"):
            right = getattr(torch.ops.chassis, name)(*wanted)
        as_tuple = [t if isinstance(t, tuple) else (t,) for t in (got, right)]
        torch.testing.assert_close(*as_tuple, rtol=1e-5, atol=1e-6)


def test_it_is_not_chosen_before_it_was_verified():
    assert all(backends.OPS[name].implementations["cuda"].verified == "" for name in OPS)
    assert backends.select("projection_kl", "cuda", (torch.float32,)) != "cuda"


def test_a_missing_extension_is_named(monkeypatch):
    monkeypatch.setattr(backends, "_CUDA", None)
    monkeypatch.setattr(backends, "_CUDA_ERROR", "No module named 'chassis_kernels._CUDA'")
    assert "CHASSIS_BUILD_CUDA=1" in backends.why_not("projection_kl", "cuda", "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnDevice:
    """The same kernels, and Triton's, as machine code. J is given: no CUDA kernel chooses it."""

    @pytest.fixture(autouse=True, params=itertools.product(("cuda", "triton"), range(max(1, torch.cuda.device_count()))))
    def place(self, request):
        """Each device in turn, while the first one is current."""
        backend, device = request.param
        if reason := backends.why_not("projection_kl", backend, "cuda"):
            pytest.skip(reason)
        self.device = torch.device("cuda", device)
        with torch.cuda.device(0), backends.use_backend(backend):
            yield

    def problem(self, *shape, dtype=torch.float32, topk, **options):
        p = problem(*shape, topk=topk, **options).to(dtype)
        with backends.use_backend("reference"):
            columns = torch.ops.chassis.top_columns(p.teacher.flatten(0, 1), None, topk)
        chunks = p.chunks._replace(**{name: t.to(self.device) for name, t in p.chunks._asdict().items()})
        options = {k: t.to(self.device) if isinstance(t, torch.Tensor) else t for k, t in p.options.items()}
        student, teacher, projection = (t.to(self.device) for t in (p.student, p.teacher, p.projection))
        return cases.Problem(student, teacher, projection, chunks, options | {"columns": columns.to(self.device)})

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("tail", [False, True])
    @pytest.mark.parametrize("divergence", cases.DIVERGENCES)
    def test_value_and_gradient(self, divergence, tail, dtype):
        options = {"divergence": divergence, "tail": tail, "labelled": True, "temperature": 1.5}
        for shape in ((2, 9, 11, 37, 29, 3, 5), (2, 70, 80, 32003, 40001, 4, 50)):
            run_on_device(self.problem(*shape, dtype=dtype, topk=shape[4] // 5, **options))

    def test_two_runs_give_the_same_bits(self):
        p = self.problem(2, 70, 80, 32003, 40001, 4, 50, dtype=torch.bfloat16, topk=8192)
        first, second = run(p), run(p)
        assert torch.equal(first[0], second[0]) and torch.equal(first[2], second[2])


def run_on_device(p):
    """The contract of `check`, with J given, and the gradient into a buffer."""
    loss, stats, grad = run(p)
    with backends.use_backend("reference"):
        right_loss, right_stats, right = cases.truth(p)
        eager = cases.truth(p, torch.float32)[2]
    error, allowed = (grad.double() - right).norm(), (eager.to(grad.dtype).double() - right).norm()
    assert error <= 2 * allowed + 4e-7 * right.norm() + 1e-7
    torch.testing.assert_close(loss.double(), right_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.chunk_kl.double(), right_stats.chunk_kl, rtol=2e-5, atol=1e-5)
    assert torch.equal(run(p, grad_buffer=torch.full_like(p.student, torch.nan))[2], grad)
