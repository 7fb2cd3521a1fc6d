"""Which implementation of an op runs, and why.

Every op is registered once, with `register`: its torch.library schema, its fake-tensor rule and one implementation per
backend. `reference` is eager PyTorch and always there; `cpu` is the C++ extension; `triton` and `cuda` need a GPU, except
that Triton's interpreter (TRITON_INTERPRET=1) runs `triton` on CPU tensors where it is asked for.
Without an override the first backend in `PREFERENCE` that is built, takes the dtypes and is verified runs. With one
(`use_backend("cpu")`, or CHASSIS_BACKEND=cpu when Python starts) exactly that backend runs, or the call raises.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_leaves


def _extension(name: str) -> tuple:
    """A compiled module and "", or None and why it cannot be imported."""
    try:
        return importlib.import_module(f"chassis_kernels.{name}"), ""
    except ImportError as error:
        return None, str(error)


_C, _C_ERROR = _extension("_C")
_CUDA, _CUDA_ERROR = _extension("_CUDA")

UNVERIFIED = "compiled, not verified"
BACKENDS = ("reference", "cpu", "triton", "cuda")
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
GPU_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

library = torch.library.Library("chassis", "DEF")
# The environment is asked once: looking there costs more than a small op.
_override: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "chassis_backend", default=os.environ.get("CHASSIS_BACKEND") or None
)


class BackendError(RuntimeError):
    """The backend asked for cannot run this call."""


@dataclass(frozen=True)
class Implementation:
    """One backend's version of an op: `run` takes the schema's arguments."""

    run: Callable
    dtypes: frozenset[torch.dtype] | None = None  # None: any floating dtype
    verified: str = ""  # hardware it was last verified on; empty: compiled, not verified


def triton_kernel(file: str, name: str, verified: str = "") -> Implementation:
    """`name` of chassis_kernels/triton/<file>.py, imported by the first call: it needs triton, this package does not."""
    return _gpu_kernel(f"triton.{file}", name, verified)


def cuda_kernel(file: str, name: str, verified: str = "") -> Implementation:
    """`name` of chassis_kernels/cuda/<file>.py, which launches csrc/cuda/<file>.cu."""
    return _gpu_kernel(f"cuda.{file}", name, verified)


def _gpu_kernel(module: str, name: str, verified: str) -> Implementation:
    def run(*args):
        return getattr(importlib.import_module(f"chassis_kernels.{module}"), name)(*args)

    return Implementation(run, GPU_DTYPES, verified)


@dataclass
class Op:
    """A registered op. `example(device)` gives small valid arguments, for self-checks and opcheck."""

    name: str
    schema: str
    implementations: dict[str, Implementation]
    example: Callable[[str], tuple]
    dispatch: Callable  # what torch calls
    calls: Counter[str] = field(default_factory=Counter)

    def __call__(self, *args):
        """The op, without torch's dispatcher where nothing needs it: that costs several times what a small call does."""
        return (self.dispatch if _plain(args) else getattr(torch.ops.chassis, self.name))(*args)

    def direct(self, *args) -> bool:
        """Run the C++ kernel on tensors without gradients, and nothing else, where it takes them as they are; did it?

        What is traced, transformed or profiled, or asked of another backend, or fits less well, goes the way of a call.
        """
        if torch.compiler.is_compiling() or not _unwatched() or _C is None or _override.get() not in _CPU:
            return False
        if any([t is not None and t.is_neg() for t in args]):
            return False
        taken = getattr(_C, self.name)(*args)
        self.calls["cpu"] += taken
        return taken


OPS: dict[str, Op] = {}


def register(
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    example: Callable[[str], tuple],
    inputs: slice = slice(None),
    **implementations: Implementation,
) -> Op:
    """Define `chassis::<schema>` in torch.library and dispatch it over the backends given.

    `inputs` are the arguments whose dtypes decide which backends can run; by default all of them.
    """
    name = schema.split("(")[0]

    def dispatch(*args):
        given = args[inputs]
        if lists:
            given = [t for arg in given for t in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        tensors = [t for t in given if isinstance(t, torch.Tensor)]
        device = "cpu" if tensors[0].is_cpu else tensors[0].device.type
        backend = select(name, device, tuple([t.dtype for t in tensors]))
        op.calls[backend] += 1
        return op.implementations[backend].run(*args)

    lists = "[]" in schema
    op = Op(name, schema, {"reference": Implementation(reference, None, "any"), **implementations}, example, dispatch)
    OPS[name] = op
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, dispatch, "CPU")
    library.impl(name, dispatch, "CUDA")
    torch.library.register_fake(f"chassis::{name}", fake, lib=library)
    return op


def no_second_derivative(op: str, instead: str) -> None:
    """Let a backward through the backward op of `op` raise RuntimeError, which says what to use `instead`."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"{op} has no second derivative: {instead}")

    torch.library.register_autograd(
        f"chassis::{op}_backward", refuse, setup_context=lambda ctx, inputs, output: None, lib=library
    )


def _plain(args: tuple) -> bool:
    """Whether these are ordinary tensors without gradients that nobody traces, transforms or profiles.

    torch's dispatcher writes out what a tensor only stands for: x.conj().imag holds the values of x.imag and a sign.
    """
    if torch.compiler.is_compiling() or not _unwatched():
        return False
    tensors = [t for t in args if isinstance(t, torch.Tensor)]
    tensors += [t for arg in args if isinstance(arg, list) for t in arg if isinstance(t, torch.Tensor)]
    if not _ORDINARY.issuperset(map(type, tensors)) or any([t.is_neg() for t in tensors]):
        return False
    return not (torch.is_grad_enabled() and any([t.requires_grad for t in tensors]))


def ordinary(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether these are tensors of torch's own kind with values to look at: nobody compiles or transforms the call."""
    if torch.compiler.is_compiling() or _modes() or _transforms() is not None:
        return False
    return _ORDINARY.issuperset(map(type, tensors))


def _unwatched() -> bool:
    """Whether nobody traces, transforms or profiles what is called; not for the compiler, which cannot trace this."""
    return not (_modes() or _profiles()) and _transforms() is None and _traces() is None


# Looked up once: the path to each costs more than the question.
_modes, _transforms = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack
_profiles, _traces = torch.autograd._profiler_enabled, torch._C._get_tracing_state
_CPU = frozenset((None, "cpu"))  # overrides under which the C++ kernel may run
_ORDINARY = frozenset((torch.Tensor, torch.nn.Parameter))


def select(op: str, device: str, dtypes: tuple[torch.dtype, ...]) -> str:
    """Name of the backend that runs `op` on this device and these dtypes; raises BackendError for a bad override."""
    wanted = _override.get()
    if wanted is not None:
        reason = why_not(op, wanted, device, dtypes)
        if reason:
            raise BackendError(f"{op}: backend {wanted!r} was asked for, but {reason}")
        return wanted
    return _default(op, device, dtypes)


@functools.cache
def _default(op: str, device: str, dtypes: tuple[torch.dtype, ...]) -> str:
    for backend in PREFERENCE.get(device, ("reference",)):
        implementation = OPS[op].implementations.get(backend)
        if implementation and implementation.verified and not why_not(op, backend, device, dtypes):
            return backend
    return "reference"


def why_not(op: str, backend: str, device: str, dtypes: tuple[torch.dtype, ...] = ()) -> str:
    """Why `backend` cannot run `op` here, in words; empty when it can."""
    if backend not in BACKENDS:
        return f"the backends are {', '.join(BACKENDS)}"
    implementation = OPS[op].implementations.get(backend)
    if implementation is None:
        return f"{op} has no {backend} implementation"
    if backend == "cpu" and _C is None:
        return f"the C++ extension is not built ({_C_ERROR}); install a C++17 compiler and reinstall chassis-kernels"
    if backend == "cuda" and _CUDA is None:
        return f"the CUDA extension is not built ({_CUDA_ERROR}); build it with CHASSIS_BUILD_CUDA=1, which needs nvcc"
    if backend == "cpu" and device != "cpu":
        return f"the tensors are on {device}"
    if backend == "triton" and not have_triton():
        return "triton is not installed; `pip install 'chassis-kernels[gpu]'` brings it"
    interpretable = backend == "triton" and device == "cpu"
    if interpretable and not interpreting():
        return "the tensors are on cpu, not on a GPU, and TRITON_INTERPRET=1 was not set when Python started"
    if backend in ("triton", "cuda") and device != "cuda" and not interpretable:
        return f"the tensors are on {device}, not on a GPU"
    floats = {dtype for dtype in dtypes if dtype.is_floating_point}
    unsupported = floats - implementation.dtypes if implementation.dtypes is not None else set()
    if unsupported:
        return f"it does not take {', '.join(sorted(str(d) for d in unsupported))}"
    return ""


@functools.cache
def have_triton() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter: TRITON_INTERPRET, set before triton was first imported."""
    if os.environ.get("TRITON_INTERPRET", "").lower() not in ("1", "true", "on", "yes", "y"):
        return False
    language = sys.modules.get("triton.language")
    return language is None or type(language.sum).__name__ != "JITFunction"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on exactly this backend; a call it cannot serve raises BackendError."""
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def capabilities() -> list[dict]:
    """One row per op and backend: {op, backend, built, executed, interpreted, verified, note}.

    Each op's example is run here and held against the reference: `executed` is False, and `note` says why, where it cannot
    run, fails or disagrees. `interpreted`: it ran, but in Triton's interpreter, not as the machine code of a GPU.
    """
    rows = []
    for op in OPS.values():
        for backend, implementation in op.implementations.items():
            note = _try(op, backend)
            rows.append(
                {
                    "op": op.name,
                    "backend": backend,
                    "built": {"cpu": _C is not None, "triton": have_triton(), "cuda": _CUDA is not None}.get(backend, True),
                    "executed": not note,
                    "interpreted": backend == "triton" and not note and interpreting(),
                    "verified": implementation.verified or UNVERIFIED,
                    "note": note,
                }
            )
    return rows


def _try(op: Op, backend: str) -> str:
    """Why the example of `op` does not give on `backend` what the reference gives; empty when it does."""
    interpreted = backend == "triton" and interpreting()
    device = "cuda" if backend in ("triton", "cuda") and not interpreted else "cpu"
    reason = why_not(op.name, backend, device)
    if reason:
        return reason
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device here"

    def values(name: str) -> list[torch.Tensor]:
        arguments = op.example(device)
        with use_backend(name), torch.no_grad():
            outputs = getattr(torch.ops.chassis, op.name)(*arguments)
        return [t for t in tree_leaves((arguments, outputs)) if isinstance(t, torch.Tensor)]

    try:
        pairs = zip(values(backend), values("reference"), strict=True)
        close = all(torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True) for a, b in pairs)
    except Exception as error:  # the doctor reports whatever a backend does here, and goes on with the next
        return f"{type(error).__name__}: {error}"
    return "" if close else "its result differs from the reference"


def cpu_isa() -> str:
    """Which variant of the C++ kernels runs here: "avx512", "avx2", "portable", or "none" when they are not built."""
    return "none" if _C is None else _C.isa()


def matrix_args(tensor: torch.Tensor | None) -> tuple[int, int, int, int, int] | None:
    """A 1-D or 2-D tensor as the extension takes it: (pointer, rows, columns, row stride, dtype code).

    The last dimension must be contiguous (see `rows_contiguous`).
    """
    if tensor is None:
        return None
    rows, columns = (1, *tensor.shape) if tensor.dim() == 1 else tensor.shape
    stride = columns if tensor.dim() == 1 else tensor.stride(0)
    return tensor.data_ptr(), rows, columns, stride, DTYPE_CODES[tensor.dtype]


def rows_contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor itself if its last dimension is contiguous, else a contiguous copy."""
    if tensor is None or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()
