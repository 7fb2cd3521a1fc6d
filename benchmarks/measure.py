"""From a case to its rows: the gate against float64 first, then time, memory and the share of the ceiling.

The gate: the relative error in the Frobenius norm, the worst of the result's tensors, is at most twice that of eager plus
FLOOR. FLOOR is eight roundings of float32, below which two summation orders differ by luck.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks import timing
from benchmarks.cases import Case, Provider, double
from benchmarks.ceilings import bound, ceilings
from benchmarks.peers import peers_of
from chassis_kernels.backends import OPS, BackendError, use_backend

FLOOR = 8 * torch.finfo(torch.float32).eps
FIELDS = (
    "op shape dtype provider status reason backend median_ms p20_ms p80_ms ratio_to_eager ratio_p20 ratio_p80 peak_bytes "
    "bytes flops error error_limit ceiling ceiling_rate share rounds device versions"
).split()


def measure(
    case: Case,
    *,
    device: str = "cpu",
    rounds: int = 7,
    providers: tuple[str, ...] | None = None,
    without: tuple[str, ...] = (),
) -> Iterator[dict]:
    """One row (FIELDS) per provider of `case`, or per one of `providers` and eager, except `without`; statuses ok, failed,
    skipped."""
    peers, reasons = peers_of(case, device)
    case = replace(case, providers=with_backends(case.providers, device) | peers)
    wanted = {name for name in case.providers if providers is None or name.split("[")[0] in providers} | {"eager"}
    wanted -= set(without)
    place = torch.device(device)
    inputs = case.make(place)
    torch._dynamo.reset()
    errors, limits, backends, failures = gate(case, [name for name in case.providers if name in wanted], inputs)
    good = [name for name in errors if name not in failures]
    copies = timing.copies_of(inputs, place)
    steps = {name: [case.providers[name].prepare(*each) for each in copies] for name in good}
    peaks = {name: timing.peak_bytes(steps[name][0], place) for name in good}
    times = timing.rounds_of(steps, rounds, place)
    rates = ceilings(device)
    ceiling, allowed = bound(case.flops, case.bytes, case.dtype, rates)
    fixed = {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "bytes": case.bytes,
        "flops": case.flops,
        "ceiling": ceiling,
        "ceiling_rate": rates[ceiling],
        "rounds": rounds,
        **environment(device),
    }
    for name in [name for name in case.providers if name in wanted]:
        row = {"provider": name, "error": errors.get(name), "error_limit": limits.get(name), "backend": backends.get(name)}
        if name in good:
            row["status"], row["peak_bytes"] = "ok", peaks[name]
            row["median_ms"], row["p20_ms"], row["p80_ms"] = timing.spread(times[name])
            row["share"] = allowed / row["median_ms"]
            if "eager" in times:
                paired = timing.ratios(times["eager"], times[name])
                row["ratio_to_eager"], row["ratio_p20"], row["ratio_p80"] = timing.spread(paired)
        else:
            row["status"], row["reason"] = failures[name]
        yield _complete(fixed | row)
    for name, reason in reasons.items():
        if providers is None or name in providers:
            yield _complete(fixed | {"provider": name, "status": "skipped", "reason": reason})


def with_backends(providers: dict[str, Provider], device: str) -> dict[str, Provider]:
    """On a GPU every provider of ours also as `chassis[triton]` and `chassis[cuda]`, as far as its op has those backends.

    The provider without a name in brackets runs what is chosen by default, which is a backend that was verified.
    """
    found = {}
    for name, provider in providers.items():
        found[name] = provider
        backends = ("triton", "cuda") if provider.op and device == "cuda" else ()
        for backend in backends:
            if backend in OPS[provider.op].implementations:
                found[f"{name}[{backend}]"] = replace(provider, prepare=partial(_prepare_on, backend, provider))
    return found


def _prepare_on(backend: str, provider: Provider, *inputs):
    step = provider.prepare(*inputs)

    def forced():
        with use_backend(backend):
            return step()

    return forced


def environment(device: str) -> dict:
    """{device, versions}: what the figures hold for. Names no machine."""
    from chassis_kernels.backends import cpu_isa

    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads, {cpu_isa()}"
    versions = {"torch": torch.__version__, "python": platform.python_version(), "cuda": torch.version.cuda}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = None
    return {"device": name, "versions": versions}


def gate(case: Case, names: list[str], inputs: tuple) -> tuple[dict, dict, dict, dict]:
    """Errors, limits and backends by provider, and {provider: (status, reason)} for those that are not timed."""
    truth = case.truth(*map(double, inputs))
    errors, limits, backends, failures, measured = {}, {}, {}, {}, None
    for name in sorted(names, key=lambda name: name != "eager"):
        provider = case.providers[name]
        calls = dict(OPS[provider.op].calls) if provider.op else {}
        try:
            given = timing.clone(inputs)
            found = provider.read(provider.prepare(*given)(), *given)
        except Exception as error:  # a provider that cannot run here is a row with its reason, not the end of the run
            optional = name == "compile" or isinstance(error, BackendError)
            failures[name] = "skipped" if optional else "failed", _one_line(error)
            continue
        if provider.op:
            backends[name] = next((b for b, n in OPS[provider.op].calls.items() if n > calls.get(b, 0)), None)
        errors[name] = _error(found, provider.of(truth))
        if name == "eager":
            measured = tuple(t.clone() for t in found)
        limits[name] = FLOOR + (2 * _error(provider.of(measured), provider.of(truth)) if measured else 0.0)
        if _held(name, provider) and not errors[name] <= limits[name]:
            failures[name] = "failed", f"error {errors[name]:.1e} is above {limits[name]:.1e}, twice eager's and the floor"
    return errors, limits, backends, failures


def _held(name: str, provider: Provider) -> bool:
    """Eager ways are the measure, not the measured: rounding them as they do is what makes them eager."""
    return not name.startswith("eager") and not provider.approximate


def _error(found: tuple, truth: tuple) -> float:
    errors = [
        float((a.to(b.device).double() - b).norm() / b.norm().clamp_min(torch.finfo(torch.float64).tiny))
        for a, b in zip(found, truth, strict=True)
    ]
    return max((error if error == error else float("inf") for error in errors), default=0.0)


def _complete(row: dict) -> dict:
    return {name: row.get(name) for name in FIELDS}


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
