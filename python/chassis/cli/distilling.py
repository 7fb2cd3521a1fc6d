"""`chassis distill`: train a student from teachers that need not share its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chassis.cli import app
from chassis.cli.terminal import Terminal, command
from chassis.errors import ChassisError


@command(app, "distill", resumes=True)
def distill(
    terminal: Terminal,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[cache] [KEY=VALUE]...", help="Overrides such as training.steps=50; first cache, to write caches."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML file.", show_default=False)] = None,
) -> dict:
    """Train a student from one or several teachers, whatever their tokenizers; `cache` writes the teachers' distributions.

    Runs under torchrun as it is. The same command goes on from the newest checkpoint.
    """
    _check_packages()
    from chassis.cli.loading import quiet
    from chassis.distill.config import load_config
    from chassis.distill.inputs import write_caches
    from chassis.distill.report import print_report, write_report
    from chassis.distill.run import distill, is_main_process

    overrides = list(arguments or [])
    caching = overrides[:1] == ["cache"]
    if config is None and not overrides:
        raise ChassisError("nothing to do: give --config FILE, or student=, out=, teachers= and data.train= as KEY=VALUE")
    settings = load_config(config, overrides[caching:])
    quiet()
    if caching:
        with terminal.progress() as report:
            caches = write_caches(settings, report)
        for cache in caches:
            terminal.console.print(
                f"{cache['folder']}: {cache['samples']} samples, {cache['bytes'] / 1e6:.1f} MB", markup=False
            )
        return {"caches": caches}
    with terminal.progress() as report:
        results = distill(settings, report if is_main_process() else lambda *_: None)
    if is_main_process():
        page = write_report(results, settings.out)
        print_report(results, terminal.console)
        terminal.note(f"the student and {page.name} are in {settings.out}")
    return results


@command(app, "demo-distill")
def demo_distill(
    terminal: Terminal,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path("chassis-demo-distill"),
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps.", min=1)] = 60,
) -> dict:
    """Distil the testbed: a prose model learns from a teacher with another tokenizer and one with its own."""
    _check_packages()
    from chassis.cli.loading import quiet
    from chassis.distill.demo import run_demo
    from chassis.distill.report import print_report, write_report
    from chassis.files import ensure_writable
    from chassis.testbed import build

    ensure_writable(out)
    quiet()
    testbed = build()
    with terminal.progress() as report:
        results = run_demo(testbed, out, steps, report)
    page = write_report(results, out)
    print_report(results, terminal.console)
    terminal.note(f"the student and {page.name} are in {out}")
    return results


def _check_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("accelerate", "omegaconf", "tensorboard") if find_spec(name) is None]
    if missing:
        raise ChassisError(f"distillation needs {', '.join(missing)}: pip install 'chassis-kernels[distill]'")
