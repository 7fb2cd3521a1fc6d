"""projection_kl against eager PyTorch and torch.compile: time, memory above the inputs, error as a gate.

    python benchmarks/bench_projection_kl.py [--shape small|large] [--dtype fp32|bf16] [--rounds 7] [--compile] [--json]

Each provider makes the loss and the gradient with respect to the student logits. They take turns, so that a busy machine
slows all of them; reported: median, 20th and 80th percentile over the rounds. Memory: growth of the resident set's
high-water mark over one call in a fresh process, in units of one float32 [T, V_s] tensor; a fresh gradient counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch

from chassis_kernels import Chunks, SparseProjection, projection_kl
from chassis_kernels.chunks import chunk_means, layout
from chassis_kernels.reference import projection_kl as reference

SHAPES = {"small": (512, 32000, 51200), "large": (256, 128256, 151936), "tiny": (64, 3000, 4000)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ENTRIES, TOPK = 4, 8192


def inputs(shape: str, dtype: torch.dtype, seed: int = 0) -> tuple:
    """Random logits; chunks of one to three tokens on either side; rows of four entries, weights falling."""
    rows, v_s, v_t = SHAPES[shape]
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(1, rows, v_s, generator=g).mul_(2).to(dtype)
    teacher = torch.randn(1, rows, v_t, generator=g).mul_(2).to(dtype)
    weights = torch.rand(v_s, ENTRIES, generator=g).sort(1, descending=True).values
    projection = SparseProjection(
        torch.randint(0, v_t, (v_s, ENTRIES), generator=g), weights / weights.sum(1, keepdim=True), v_t
    )
    ids = []
    for _ in range(2):
        sizes = torch.randint(1, 4, (rows,), generator=g)
        ids.append(torch.arange(rows).repeat_interleave(sizes)[None, :rows])
    chunks = Chunks(*ids, torch.ones(1, int(min(i.max() for i in ids)) + 1, dtype=torch.bool))
    slots = chunks.valid.shape[1]
    return student, teacher, projection, chunks._replace(student=_capped(ids[0], slots), teacher=_capped(ids[1], slots))


def _capped(ids: torch.Tensor, slots: int) -> torch.Tensor:
    return torch.where(ids < slots, ids, -1)


def providers(student, teacher, projection, chunks, compiled: bool) -> dict:
    """name -> function returning (loss, gradient)."""
    buffer = torch.zeros_like(student)
    leaf = student.requires_grad_()

    def fused(**options):
        loss, _ = projection_kl(leaf, teacher, projection, chunks, vocab_topk=TOPK, **options)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    def autograd(loss_of):
        loss = loss_of(leaf, teacher, projection, chunks)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    made = {
        "eager": lambda: autograd(project_rows),
        "reference": lambda: autograd(project_chunks),
        "chassis_fresh": fused,
        "chassis_buffer": lambda: fused(grad_buffer=buffer),
    }
    if compiled:
        made["compile_eager"] = lambda: autograd(torch.compile(project_rows))
        made["compile_reference"] = lambda: autograd(torch.compile(project_chunks))
    return made


def project_rows(student, teacher, projection, chunks) -> torch.Tensor:
    """The loss as published eager code writes it: every row is projected, then chunks are averaged."""
    plan = layout(chunks, None, False, torch.float32)
    columns = torch.topk(teacher[0].amax(0), TOPK).indices.sort().values
    edges = projection.slice(columns)
    places, size = torch.stack([edges.positions, edges.rows]), (len(columns), student.shape[2])
    matrix = torch.sparse_coo_tensor(places, edges.weights, size, check_invariants=False)
    p = torch.softmax(student[0].float(), 1)
    a = chunk_means(torch.sparse.mm(matrix, p.T).T, plan.student, plan.student_count)
    Q = chunk_means(torch.log_softmax(teacher[0][:, columns].float(), 1), plan.teacher, plan.teacher_count)
    log_r = (a / (a.sum(1, keepdim=True) + 1e-10) + 1e-10).log()
    kl = (Q.exp() * (Q - log_r)).sum(1)
    return torch.where(plan.paired, kl, 0.0).sum() / plan.paired.sum()


def project_chunks(student, teacher, projection, chunks) -> torch.Tensor:
    """The package's eager definition: chunks are averaged, then projected."""
    return reference.loss(student, teacher, projection, chunks, vocab_topk=TOPK)[0]


def gate(made: dict, student, teacher, projection, chunks) -> dict[str, float]:
    """Relative error of every provider's gradient against float64; ours must not be above twice the reference's.

    Eager `topk` may break bfloat16 ties among the columns differently: its error then includes other columns.
    """
    leaf = student.detach().double().requires_grad_()
    right = torch.autograd.grad(project_chunks(leaf, teacher.double(), projection, chunks), leaf)[0]
    errors = {}
    for name, function in made.items():
        errors[name] = float((function()[1].double() - right).norm() / right.norm())
    for name in errors:
        if name.startswith("chassis") and not errors[name] <= 2 * errors["reference"] + 4e-7:
            raise SystemExit(f"{name} is wrong: gradient off by {errors[name]:.1e}, reference by {errors['reference']:.1e}")
    return errors


def memory(shape: str, dtype: str, provider: str) -> float:
    """Peak growth over one call in a process of its own, in units of float32 [T, V_s]."""
    command = [sys.executable, __file__, "--shape", shape, "--dtype", dtype, "--peak", provider]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def peak(shape: str, dtype: str, provider: str) -> None:
    given = inputs(shape, DTYPES[dtype])
    function = providers(*given, compiled=provider.startswith("compile"))[provider]
    given[2].columns  # noqa: B018 - belongs to the projection
    small = inputs("tiny", DTYPES[dtype])
    providers(*small, compiled=False)["chassis_fresh"]()
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM
    function()
    rows, v_s, _ = SHAPES[shape]
    print((status("VmHWM") - before) / (4 * rows * v_s))


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024


def bench(shape: str, dtype: str, rounds: int, compiled: bool) -> list[dict]:
    given = inputs(shape, DTYPES[dtype])
    made = providers(*given, compiled)
    errors = gate(made, *given)
    times = {name: [] for name in made}
    for _ in range(rounds):
        for name, function in made.items():
            started = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - started))
    rows = []
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        quantiles = statistics.quantiles(values, n=5) if len(values) > 1 else values * 4
        rows.append(
            {
                "op": "projection_kl",
                "shape": "x".join(map(str, SHAPES[shape])),
                "dtype": dtype,
                "provider": name,
                "median_ms": medians[name],
                "p20_ms": quantiles[0],
                "p80_ms": quantiles[3],
                "speedup": medians["eager"] / medians[name],
                "peak_units": memory(shape, dtype, name) if not name.startswith("compile") else None,
                "error": errors[name],
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the eager loss")
    parser.add_argument("--json", action="store_true", help="one JSON row a line")
    parser.add_argument("--peak", metavar="PROVIDER", help="print only this provider's memory")
    arguments = parser.parse_args()
    if arguments.peak:
        return peak(arguments.shape, arguments.dtype, arguments.peak)
    for row in bench(arguments.shape, arguments.dtype, arguments.rounds, arguments.compile):
        if arguments.json:
            print(json.dumps(row), flush=True)
            continue
        units = "" if row["peak_units"] is None else f"  peak {row['peak_units']:.3f} units"
        spread = f"{row['p20_ms']:.1f}-{row['p80_ms']:.1f}"
        figures = f"{row['median_ms']:9.1f} ms ({spread})  {row['speedup']:5.1f} x{units}  error {row['error']:.1e}"
        print(f"{row['provider']:15} {figures}")


if __name__ == "__main__":
    main()
