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
    op: Annotated[str | None, typer.Argument(help="moments, ridge, delta_logits, linear_kl, ...; by default all.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Rounds in which each provider is timed.", min=1)] = 7,
) -> dict:
    """Check each op on this machine, then time it against eager PyTorch."""
    from chassis.bench import bench as measure
    from chassis.bench import harness
    from chassis.doctor import environment

    with terminal.progress() as report:
        rows = measure(op, rounds=rounds, progress=report)
    terminal.console.print(harness().table(rows))
    return {"rows": rows, "environment": environment()}
