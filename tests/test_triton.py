"""What every Triton kernel stands on: the interpreter, the lazy import, tuning tables, and offsets past 2^31."""

import ast
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import far_apart
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from chassis_kernels import BackendError, backends, capabilities, use_backend
from chassis_kernels.triton import tuning

KERNELS = Path(tuning.__file__).parent
WITH_TRITON = sorted(name for name, op in backends.OPS.items() if "triton" in op.implementations)
ON_GPUS = sorted((n, b) for n, op in backends.OPS.items() for b in op.implementations if b in ("triton", "cuda"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
needs_triton = pytest.mark.skipif(
    not backends.have_triton() or (DEVICE == "cpu" and not backends.interpreting()), reason="no triton to run kernels with"
)
needs_interpreter = pytest.mark.skipif(not backends.have_triton() or not backends.interpreting(), reason="no interpreter")


def python(code, **environment):
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)


@needs_triton
@pytest.mark.parametrize("name", WITH_TRITON)
def test_each_kernel_gives_what_the_reference_gives_on_its_example(name):
    row = next(row for row in capabilities() if (row["op"], row["backend"]) == (name, "triton"))
    assert row["executed"], row["note"]
    assert row["interpreted"] == backends.interpreting() and row["verified"] == "compiled, not verified"


def tensors_of(name, backend, device):
    """All tensors of the example of the op `name` after a call on `backend`, arguments and results."""
    arguments = backends.OPS[name].example(device)
    with use_backend(backend):
        out = getattr(torch.ops.chassis, name)(*arguments)
    return [t for t in tree_leaves((arguments, out)) if isinstance(t, torch.Tensor)]


@needs_triton
@pytest.mark.parametrize("name", WITH_TRITON)
def test_the_first_call_does_what_the_second_does(name):
    first, second = (tensors_of(name, "triton", DEVICE) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("own, current", [(1, 0), (0, 1)])
@pytest.mark.parametrize("name, backend", ON_GPUS)
def test_tensors_need_not_lie_on_the_current_device(name, backend, own, current):
    if reason := backends.why_not(name, backend, "cuda"):
        pytest.skip(reason)
    with torch.cuda.device(current):
        found, expected = (tensors_of(name, each, f"cuda:{own}") for each in (backend, "reference"))
        assert torch.cuda.current_device() == current
    for a, b in zip(found, expected, strict=True):
        assert a.device == b.device == torch.device("cuda", own)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)


@needs_triton
def test_a_launch_makes_the_device_of_its_tensors_current(monkeypatch):
    """Held here without a GPU: fake tensors on the second of two devices, and a launch that is written down."""
    from chassis_kernels.triton import shared

    current, seen = [0], []

    @contextlib.contextmanager
    def device(chosen):
        current.append(chosen.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(shared, "_describe", lambda device: ("interpreter", "interpreter"))
    monkeypatch.setattr(shared, "run", lambda *launch: seen.append(current[-1]))
    kernel = SimpleNamespace(__name__=next(iter(tuning.tables("top_columns"))))
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(4, device="cuda:1")
        shared.launch("top_columns", kernel, lambda meta: (1,), 1, x=x)
    assert seen == [1] and current == [0]


@needs_interpreter
@pytest.mark.parametrize("architecture", [a for a in tuning.ARCHITECTURES if a != "interpreter"])
@pytest.mark.parametrize("name", WITH_TRITON)
def test_every_shipped_tuning_entry_gives_what_the_reference_gives(name, architecture, monkeypatch):
    def shipped(op, kernel, size, device, _):
        return tuning.tables(op)[kernel][architecture]["any"]

    monkeypatch.setattr(tuning, "entry", shipped)
    assert backends._try(backends.OPS[name], "triton") == ""


def test_the_interpreter_is_never_chosen_by_itself():
    arguments = backends.OPS["top_columns"].example("cpu")
    calls = backends.OPS["top_columns"].calls
    before = calls.get("triton", 0)
    torch.ops.chassis.top_columns(*arguments)
    assert calls.get("triton", 0) == before


def test_without_the_interpreter_cpu_tensors_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"), pytest.raises(BackendError, match="not on a GPU, and TRITON_INTERPRET=1 was not set"):
        torch.ops.chassis.top_columns(*backends.OPS["top_columns"].example("cpu"))


@needs_triton
def test_the_interpreter_must_be_asked_for_before_triton_is_imported():
    code = "import os, triton.language; os.environ['TRITON_INTERPRET'] = '1'\nfrom chassis_kernels import backends\n"
    assert python(code + "assert not backends.interpreting()").returncode == 0


def test_importing_the_ops_imports_no_triton_and_does_without():
    code = """
import sys
import chassis_kernels, chassis_kernels.triton.tuning
assert "triton" not in sys.modules
sys.modules["triton"] = None  # importing it now fails, as if it were not installed
from chassis_kernels import backends
rows = [row for row in backends.capabilities() if row["backend"] == "triton"]
assert rows and not any(row["built"] or row["executed"] for row in rows)
assert all("pip install 'chassis-kernels[gpu]'" in row["note"] for row in rows)
"""
    done = python(code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


@needs_interpreter
def test_rows_far_apart_are_reached(int32_overflow_stops):
    """Offsets past 2^31."""
    teacher = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    with use_backend("triton"):
        found = torch.ops.chassis.top_columns(far_apart(teacher), None, 7)
    assert torch.equal(found, torch.ops.chassis.top_columns(teacher, None, 7))


@needs_interpreter
def test_an_offset_in_int32_is_found(int32_overflow_stops):
    import triton
    import triton.language as tl

    @triton.jit
    def third_row(x, stride, out):
        tl.store(out, tl.load(x + (tl.program_id(0) + 3) * stride))

    with pytest.raises(Exception, match="int32 overflow"):
        third_row[(1,)](torch.zeros(4), 2**30, torch.zeros(1))


def uncast(source):
    """Lines of kernels where a program id is not made int64 at once."""
    tree = ast.parse(source)
    kernels = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and "jit" in map(name_of, n.decorator_list)]
    nodes = [node for kernel in kernels for node in ast.walk(kernel)]
    ids = {node for node in nodes if isinstance(node, ast.Call) and name_of(node.func) == "program_id"}
    cast = {
        node.func.value
        for node in nodes
        if isinstance(node, ast.Call) and name_of(node.func) == "to" and [name_of(a) for a in node.args] == ["int64"]
    }
    return sorted(node.lineno for node in ids - cast)


def name_of(node):
    return getattr(node, "attr", getattr(node, "id", None))


def test_program_ids_are_int64_before_anything_else():
    files = sorted(KERNELS.glob("*.py"))
    assert any("program_id" in file.read_text() for file in files)
    assert not {file.name: lines for file in files if (lines := uncast(file.read_text()))}


def test_a_program_id_that_is_multiplied_as_int32_is_found():
    kernel = "@triton.jit\ndef f(x, n):\n    row = {}\n    tl.store(x + row * n, 0)\n"
    assert uncast(kernel.format("tl.program_id(0)")) == [3]
    assert uncast(kernel.format("(tl.program_id(0) * n).to(tl.int64)")) == [3]
    assert uncast(kernel.format("tl.program_id(0).to(tl.int32)")) == [3]
    assert uncast(kernel.format("tl.program_id(0).to(tl.int64)")) == []


@pytest.mark.parametrize("path", sorted(tuning.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_tables_are_sound(path):
    assert tuning.tables(path.stem)


GOOD = {"BLOCK": 64, "num_warps": 4, "num_stages": 3}
DEFAULTS = {name: {"any": GOOD} for name in tuning.ARCHITECTURES}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a table for the kernel `k` of the op `op`."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.tables.cache_clear()
    yield lambda table: (tmp_path / "op.json").write_text(json.dumps({"k": table}))
    tuning.tables.cache_clear()


def test_the_device_comes_before_its_architecture_and_the_closest_size_before_any(write):
    h200 = {"1024": GOOD | {"BLOCK": 1}, "4096": GOOD | {"BLOCK": 2}}
    write(DEFAULTS | {"sm_90": {"any": GOOD | {"BLOCK": 4}, "2048": GOOD | {"BLOCK": 8}}, "NVIDIA H200": h200})
    for size, device, architecture, block in (
        (1000, "NVIDIA H200", "sm_90", 1), (1024, "NVIDIA H200", "sm_90", 1), (1025, "NVIDIA H200", "sm_90", 2),
        (9999, "NVIDIA H200", "sm_90", 4), (2048, "NVIDIA H100", "sm_90", 8), (2049, "NVIDIA H100", "sm_90", 4),
        (2048, "NVIDIA L4", "sm_89", 64), (10, "new", "sm_121", 64), (10, "old", "sm_75", 64), (10, "AMD", "gfx950", 64),
    ):  # fmt: skip
        assert tuning.entry("op", "k", size, device, architecture)["BLOCK"] == block, (size, device)


def test_a_table_that_is_not_sound_is_refused(write):
    without = {name: value for name, value in DEFAULTS.items() if name != "sm_100"}
    for table, message in (
        (without, 'k has no "any" entry for sm_100'),
        (DEFAULTS | {"sm_90": {"any": GOOD, "many": GOOD}}, 'k, sm_90, many: a size is a number or "any"'),
        (DEFAULTS | {"X": {"any": {"BLOCK": 64, "num_warps": 4}}}, "k, X, any lacks num_stages"),
        (DEFAULTS | {"X": {"any": GOOD | {"BLOCK": 48}}}, "k, X, any: BLOCK is 48, expected a power of two"),
        (DEFAULTS | {"X": {"any": GOOD | {"block": 64}}}, "k, X, any: block is neither"),
        (DEFAULTS | {"X": {"any": GOOD | {"num_stages": 0}}}, "k, X, any: num_stages is 0"),
        ([], "op.json: "),
    ):
        write(table)
        with pytest.raises(ValueError, match=message):
            tuning.tables("op")


def test_a_missing_table_or_kernel_is_named(write):
    with pytest.raises(ValueError, match="other has no tuning table: expected .*other.json"):
        tuning.entry("other", "k", 1, "", "sm_90")
    write(DEFAULTS)
    with pytest.raises(ValueError, match="no table for the kernel x: it has k"):
        tuning.entry("op", "x", 1, "", "sm_90")
