"""projection_kl against eager PyTorch and torch.compile: time, memory above the inputs, error as a gate.

    python benchmarks/bench_projection_kl.py [--shape small|large] [--dtype fp32|bf16] [--rounds 7] [--compile] [--json]

bench_gold_kl.py and bench_token_kl.py take the same options. Each provider makes the loss and the gradient with respect to
the student logits. They take turns, so that a busy machine slows all of them; reported: median, 20th and 80th percentile
over the rounds. Memory: growth of the resident set's high-water mark over one call in a fresh process, in units of one
float32 [T, V_s] tensor; a fresh gradient counts. Eager providers as published code has it, and the package's reference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from chassis_kernels import Chunks, SparseProjection, projection_kl
from chassis_kernels.chunks import chunk_means, layout
from chassis_kernels.reference import projection_kl as reference

SHAPES = {"small": (512, 32000, 51200), "large": (256, 128256, 151936), "tiny": (64, 3000, 4000)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ENTRIES, TOPK = 4, 8192
Inputs = tuple[torch.Tensor, torch.Tensor, SparseProjection, Chunks]


def inputs(shape: str, dtype: torch.dtype, exact: float = 0.0) -> Inputs:
    """Random logits; chunks of one to three tokens on either side; rows of four falling weights, a share of them exact."""
    rows, v_s, v_t = SHAPES[shape]
    g = torch.Generator().manual_seed(0)
    student = torch.randn(1, rows, v_s, generator=g).mul_(2).to(dtype)
    teacher = torch.randn(1, rows, v_t, generator=g).mul_(2).to(dtype)
    ids = torch.randint(0, v_t, (v_s, ENTRIES), generator=g)
    weights = torch.rand(v_s, ENTRIES, generator=g).sort(1, descending=True).values
    weights /= weights.sum(1, keepdim=True)
    one_to_one = int(exact * v_s)
    ids[:one_to_one, 0] = torch.randperm(v_t, generator=g)[:one_to_one]
    ids[:one_to_one, 1:] = -1
    weights[:one_to_one, 0] = 1
    sides = [torch.arange(rows).repeat_interleave(torch.randint(1, 4, (rows,), generator=g))[None, :rows] for _ in range(2)]
    slots = int(min(side.max() for side in sides)) + 1
    sides = [torch.where(side < slots, side, -1) for side in sides]
    return student, teacher, SparseProjection(ids, weights, v_t), Chunks(*sides, torch.ones(1, slots, dtype=torch.bool))


def providers(student: torch.Tensor, *_) -> dict[str, Callable]:
    """name -> loss of (student, teacher, projection, chunks)."""
    buffer = torch.zeros_like(student)
    return {
        "eager": project_rows,
        "reference": lambda *given: reference.loss(*given, vocab_topk=TOPK)[0],
        "chassis_fresh": lambda *given: projection_kl(*given, vocab_topk=TOPK)[0],
        "chassis_buffer": lambda *given: projection_kl(*given, vocab_topk=TOPK, grad_buffer=buffer)[0],
    }


def project_rows(student, teacher, projection, chunks) -> torch.Tensor:
    """The loss as published eager code writes it: every row is projected, then chunks are averaged."""
    plan = layout(chunks, None, False, torch.float32)
    columns = torch.topk(teacher[0].amax(0), min(TOPK, teacher.shape[2])).indices.sort().values
    edges = projection.slice(columns)
    places, size = torch.stack([edges.positions, edges.rows]), (len(columns), student.shape[2])
    matrix = torch.sparse_coo_tensor(places, edges.weights, size, check_invariants=False)
    p = torch.softmax(student[0].float(), 1)
    a = chunk_means(torch.sparse.mm(matrix, p.T).T, plan.student, plan.student_count)
    Q = chunk_means(torch.log_softmax(teacher[0][:, columns].float(), 1), plan.teacher, plan.teacher_count)
    log_r = (a / (a.sum(1, keepdim=True) + 1e-10) + 1e-10).log()
    kl = (Q.exp() * (Q - log_r)).sum(1)
    return torch.where(plan.paired, kl, 0.0).sum() / plan.paired.sum()


def gradient(loss_of: Callable, student: torch.Tensor, *rest) -> torch.Tensor:
    leaf = student.detach().requires_grad_()
    return torch.autograd.grad(loss_of(leaf, *rest), leaf)[0]


def gate(made: dict[str, Callable], given: tuple) -> dict[str, float]:
    """Relative error of every provider's gradient against float64; ours must not be above twice the reference's.

    Eager `topk` may break bfloat16 ties among the columns differently: its error then includes other columns.
    """
    student, teacher, *rest = given
    right = gradient(made["reference"], student.double(), teacher.double(), *rest)
    errors = {name: float((gradient(f, *given).double() - right).norm() / right.norm()) for name, f in made.items()}
    for name, error in errors.items():
        if name.startswith("chassis") and not error <= 2 * errors["reference"] + 1e-6:
            raise SystemExit(f"{name} is wrong: gradient off by {error:.1e}, reference by {errors['reference']:.1e}")
    return errors


def peak_units(shape: str, dtype: str, provider: str) -> float:
    """Peak growth over one call in a process of its own, in units of float32 [T, V_s]."""
    command = [sys.executable, sys.argv[0], "--shape", shape, "--dtype", dtype, "--peak", provider]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(make: Callable, made_by: Callable, shape: str, dtype: str, provider: str) -> None:
    warm = make("tiny", DTYPES[dtype])
    gradient(made_by(*warm)[provider], *warm)
    given = make(shape, DTYPES[dtype])
    function = made_by(*given)[provider]
    given[2].columns, given[2].exact_map()  # noqa: B018 - what the projection keeps is not the call's
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM
    gradient(function, *given)
    rows, v_s, _ = SHAPES[shape]
    print((status("VmHWM") - before) / (4 * rows * v_s))


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024


def rows_of(op: str, make: Callable, made_by: Callable, shape: str, dtype: str, rounds: int, compiled: bool) -> list[dict]:
    given = make(shape, DTYPES[dtype])
    made = made_by(*given)
    if compiled:
        made |= {f"compile_{name}": torch.compile(made[name]) for name in ("eager", "reference") if name in made}
    errors = gate(made, given)
    times = {name: [] for name in made}
    for _ in range(rounds):
        for name, function in made.items():
            started = time.perf_counter()
            gradient(function, *given)
            times[name].append(1e3 * (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in times.items()}
    baseline = medians.get("eager", medians["reference"])
    rows = []
    for name, values in times.items():
        quantiles = statistics.quantiles(values, n=5) if len(values) > 1 else values * 4
        rows.append(
            {
                "op": op,
                "shape": "x".join(map(str, SHAPES[shape])),
                "dtype": dtype,
                "provider": name,
                "median_ms": medians[name],
                "p20_ms": quantiles[0],
                "p80_ms": quantiles[3],
                "speedup": baseline / medians[name],
                "peak_units": None if name.startswith("compile") else peak_units(shape, dtype, name),
                "error": errors[name],
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    return rows


def main(op: str, make: Callable, made_by: Callable, description: str) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="T, V_s, V_t")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the eager losses")
    parser.add_argument("--json", action="store_true", help="one JSON row a line")
    parser.add_argument("--peak", metavar="PROVIDER", help="print only this provider's memory")
    given = parser.parse_args()
    if given.peak:
        return print_peak(make, made_by, given.shape, given.dtype, given.peak)
    for row in rows_of(op, make, made_by, given.shape, given.dtype, given.rounds, given.compile):
        if given.json:
            print(json.dumps(row), flush=True)
            continue
        units = "" if row["peak_units"] is None else f"  peak {row['peak_units']:.3f} units"
        spread = f"{row['p20_ms']:.1f}-{row['p80_ms']:.1f}"
        figures = f"{row['median_ms']:9.1f} ms ({spread})  {row['speedup']:5.1f} x{units}  error {row['error']:.1e}"
        print(f"{row['provider']:17} {figures}")


if __name__ == "__main__":
    main("projection_kl", inputs, providers, __doc__)
