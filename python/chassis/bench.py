"""How fast each op runs on each backend of this machine, measured only after its result has been checked.

Backends take turns within a round, so that a busy machine slows all of them; the figure is the median over rounds. The
gate: the error against the float64 reference is at most twice that of the eager reference in the input dtype.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from chassis.errors import ChassisError
from chassis_kernels import Delta, Moments, delta_logits_, linear_kl, use_backend
from chassis_kernels.backends import OPS, why_not

SHORTEST = 0.02  # seconds of a timed run


@dataclass(frozen=True)
class Case:
    """One op at one shape. `make()` draws inputs; `run(inputs)` is what is timed and returns what is checked."""

    op: str
    shape: str
    make: Callable[[], tuple]
    run: Callable[..., torch.Tensor]


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _moments(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    moments = Moments(x.shape[1], y.shape[1]).update(x, y)
    return torch.cat([moments.xx, moments.xy], 1)


def _kl(hidden, head, target, target_head, u, v, c) -> torch.Tensor:
    return linear_kl(hidden, head, target, target_head, delta=Delta(u, v, c))


CASES = (
    Case(
        "moments_update_",
        "N 4096, D 1024, T 1024",
        lambda: (_normal(4096, 1024), _normal(4096, 1024, seed=1)),
        _moments,
    ),
    Case(
        "delta_logits_",
        "N 256, V 32000, D 1024, r 32",
        lambda: (_normal(256, 32000), _normal(256, 1024, seed=1), _normal(1024, 32) / 32, _normal(32, 32000, seed=2)),
        delta_logits_,
    ),
    Case(
        "delta_logits_",
        "N 1, V 32000, D 1024, r 32",
        lambda: (_normal(1, 32000), _normal(1, 1024, seed=1), _normal(1024, 32) / 32, _normal(32, 32000, seed=2)),
        delta_logits_,
    ),
    Case(
        "linear_kl",
        "N 512, V 32000, D 512, r 32",
        lambda: (
            _normal(512, 512),
            _normal(32000, 512, seed=1) / 16,
            _normal(512, 512, seed=2),
            _normal(32000, 512, seed=3) / 16,
            _normal(512, 32, seed=4),
            _normal(32, 32000, seed=5) / 8,
            _normal(32000, seed=6) / 8,
        ),
        _kl,
    ),
)


def bench(op: str | None = None, *, rounds: int = 7, progress: Callable[[str, int, int], None] | None = None) -> list[dict]:
    """Rows {op, shape, backend, milliseconds, spread, speedup, error, reference_error} for one op or for all.

    `spread` is the range from the fastest to the slowest round over the median; `speedup` is against the eager reference.
    Raises ChassisError for an op that has no case.
    """
    cases = [case for case in CASES if op in (None, case.op, case.op.rstrip("_"))]
    if not cases:
        raise ChassisError(f"no benchmark of {op!r}: expected one of {', '.join(dict.fromkeys(case.op for case in CASES))}")
    rows = []
    for number, case in enumerate(cases):
        rows += _measure(case, rounds)
        if progress:
            progress("bench", number + 1, len(cases))
    return rows


def _measure(case: Case, rounds: int) -> list[dict]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = case.make()
    backends = [name for name in OPS[case.op].implementations if not why_not(case.op, name, device, {torch.float32})]
    backends.sort(key=lambda name: name != "reference")
    truth = _on("reference", case, tuple(t.double() for t in inputs), device="cpu")
    inputs = tuple(t.to(device) for t in inputs)
    errors = {}
    for name in backends:
        result = _on(name, case, inputs, device)
        errors[name] = ((result.double().cpu() - truth).norm() / truth.norm()).item()
        if not errors[name] <= 2 * errors["reference"] + 1e-12:
            raise ChassisError(
                f"{case.op} on {name} is wrong at {case.shape}: relative error {errors[name]:.1e} against "
                f"{errors['reference']:.1e} of eager; it is not timed"
            )
    times: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(rounds):
        for name in backends:
            times[name].append(_time(name, case, inputs, device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return [
        {
            "op": case.op,
            "shape": case.shape,
            "backend": name,
            "milliseconds": 1e3 * medians[name],
            "spread": (max(times[name]) - min(times[name])) / medians[name],
            "speedup": medians["reference"] / medians[name],
            "error": errors[name],
            "reference_error": errors["reference"],
        }
        for name in backends
    ]


def _on(backend: str, case: Case, inputs: tuple, device: str) -> torch.Tensor:
    copies = tuple(t.to(device).clone() for t in inputs)
    with torch.no_grad(), use_backend(backend):
        return case.run(*copies)


def _time(backend: str, case: Case, inputs: tuple, device: str) -> float:
    """Seconds per call, over enough calls for the clock."""
    with torch.no_grad(), use_backend(backend):
        calls, started = 0, time.perf_counter()
        while calls == 0 or time.perf_counter() - started < SHORTEST:
            case.run(*inputs)
            calls += 1
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / calls
