"""`chassis doctor` and `chassis bench`: what works on this machine, and how fast."""

from __future__ import annotations

from typing import Annotated

import typer

from chassis.cli import app
from chassis.cli.terminal import Terminal, command


@command(app, "doctor")
def doctor(
    terminal: Terminal,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with code 1 if something is missing.")] = False,
) -> dict:
    """Say what is installed, which op runs on which backend here, and what to do about the rest."""
    from chassis.doctor import examine, print_findings

    findings = examine()
    print_findings(findings, terminal.console)
    terminal.exit_code = 1 if strict and findings["hints"] else 0
    return findings


@command(app, "bench")
def bench(
    terminal: Terminal,
    op: Annotated[str | None, typer.Argument(help="moments_update_, delta_logits_ or linear_kl; by default all.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Timed runs of each backend.", min=1)] = 7,
) -> dict:
    """Check each op on each backend of this machine, then time it against eager PyTorch."""
    import rich.box
    from rich.table import Table

    from chassis.bench import bench as measure
    from chassis.doctor import environment

    with terminal.progress() as report:
        rows = measure(op, rounds=rounds, progress=report)
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for name in ("op", "shape", "backend"):
        table.add_column(name)
    for name in ("median ms", "spread", "speedup"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        figures = f"{row['milliseconds']:.2f}", f"{100 * row['spread']:.0f} %", f"{row['speedup']:.2f} ×"
        table.add_row(row["op"], row["shape"], row["backend"], *figures)
    terminal.console.print(table)
    return {"rows": rows, "environment": environment()}
