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
