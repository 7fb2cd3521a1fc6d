"""The registry of what is measured: an op at a shape and dtype, and every provider of that result.

A provider is a function `prepare(*inputs) -> step`; `step()` is what is timed, and `read(step(), *inputs)` what is held
against float64. Adding a shape or a provider in `ops/` is all it takes to have it checked, timed and plotted.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

OPS = (
    "moments",
    "ridge",
    "ridge_cv",
    "pca",
    "delta_logits",
    "port",
    "linear_kl",
    "projection_kl",
    "linear_projection_kl",
    "gold_kl",
    "token_kl",
    "bridge_project",
    "log_sums",
)
LEVELS = ("tiny", "quick", "default", "scaling", "full", "gpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def tensors(output, *inputs) -> tuple[Tensor, ...]:
    """A step's output as a tuple of tensors."""
    return output if isinstance(output, tuple) else (output,)


@dataclass(frozen=True)
class Provider:
    """One way to the result. `of` maps the full result to what this provider returns of it (a mean, say)."""

    prepare: Callable[..., Callable]
    read: Callable[..., tuple[Tensor, ...]] = tensors
    of: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = staticmethod(lambda full: full)
    op: str | None = None  # the registered op whose backend the row names
    approximate: bool = False  # timed whatever its error, which the row names


@dataclass(frozen=True)
class Case:
    """An op at a shape and dtype. `flops` and `bytes` are what the result needs at least, not what a provider spends."""

    op: str
    shape: dict[str, int | str]
    dtype: str
    make: Callable[[torch.device], tuple]
    truth: Callable[..., tuple[Tensor, ...]]  # of the inputs in float64
    providers: dict[str, Provider] = field(repr=False)
    flops: float
    bytes: float

    @property
    def label(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.shape.items())


def simple(function: Callable, **options) -> Provider:
    """A provider without state: `function(*inputs)` on every step."""
    return Provider(lambda *inputs: lambda: function(*inputs), **options)


def products(function: Callable) -> Provider:
    """The matrix products of a case alone, `function(*inputs)`: how much of eager's time no loss can save. No result."""
    return simple(function, read=lambda output, *inputs: (), of=lambda full: ())


def compiled(function: Callable, **options) -> Provider:
    """`function` under torch.compile; a failure to compile shows when the step first runs."""

    def prepare(*inputs):
        run = torch.compile(function, dynamic=False)
        return lambda: run(*inputs)

    return Provider(prepare, **options)


def generator(device: torch.device) -> Callable[..., Tensor]:
    """`normal(*shape)`, standard normal draws from seed 0 on `device`."""
    source = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=source, device=device)


def double(value):
    """Floating tensors in float64, everything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def cases(op: str, level: str, dtypes: tuple[str, ...] = tuple(DTYPES)) -> list[Case]:
    """All cases of `op` at `level`; "full" is "default" and "scaling", the small shapes that differ in one size.

    Raises ValueError for an op or a level that is not there.
    """
    if op not in OPS or level not in LEVELS:
        raise ValueError(f"op {op!r}, level {level!r}: expected one of {', '.join(OPS)} and one of {', '.join(LEVELS)}")
    module = importlib.import_module(f"benchmarks.ops.{op}")
    shapes = [shape for name in (("default", "scaling") if level == "full" else (level,)) for shape in module.SHAPES[name]]
    return [module.case(dtype=dtype, **shape) for dtype in dtypes if dtype in module.DTYPES for shape in shapes]
