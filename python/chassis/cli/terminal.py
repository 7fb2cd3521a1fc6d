"""What every command shares: --json and --debug, progress on stderr, errors as one line."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from chassis.errors import ChassisError

USER_ERROR, INTERRUPTED = 2, 130
JSON_OPTION = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
DEBUG_OPTION = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class Terminal:
    """Where a command talks: `console` for people (silent with --json), `messages` is stderr."""

    exit_code = 0

    def __init__(self, as_json: bool) -> None:
        self.console = Console(quiet=as_json)
        self.messages = Console(stderr=True)

    def note(self, text: str) -> None:
        """A line beside the results."""
        self.messages.print(Text(text, "dim"), soft_wrap=True)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Callable[[str, int, int], None]]:
        """Gives `report(stage, done, total)`: one bar for each stage."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self.messages) as bars:
            tasks = {}

            def report(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=total)
                bars.update(tasks[stage], completed=done, total=total)

            yield report


def command(app: typer.Typer, name: str, resumes: bool = False) -> Callable:
    """Register `function(terminal, ...) -> dict` under `name`, with --json and --debug added.

    The dict is what --json prints. A ChassisError becomes one red line on stderr and exit code 2, and with --json also
    {"error": message} on stdout. `resumes`: the same command goes on where one was interrupted.
    """

    def register(function: Callable[..., dict]) -> Callable:
        signature = inspect.signature(function, eval_str=True)
        own = list(signature.parameters.values())[1:]

        @functools.wraps(function)
        def run(*, as_json: bool, debug: bool, **options) -> None:
            _run(function, Terminal(as_json), as_json, debug, resumes, options)

        added = [
            inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=JSON_OPTION),
            inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=DEBUG_OPTION),
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + added
        run.__signature__ = signature.replace(parameters=parameters, return_annotation=None)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name)(run)
        return function

    return register


def _run(
    function: Callable[..., dict], terminal: Terminal, as_json: bool, debug: bool, resumes: bool, options: dict
) -> None:
    stdout = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            result = function(terminal, **options)
    except KeyboardInterrupt:
        terminal.messages.print("[yellow]interrupted[/]" + ": the same command goes on from what it kept" * resumes)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if debug or not _is_users(error):
            raise
        terminal.messages.print(Text("error: ", "red bold") + Text(str(error), "red"), soft_wrap=True)
        if as_json:
            print(json.dumps({"error": str(error)}), file=stdout)
        raise typer.Exit(USER_ERROR) from None
    if as_json:
        from chassis.page import plain

        print(json.dumps(plain(result), allow_nan=False), file=stdout)
    if terminal.exit_code:
        raise typer.Exit(terminal.exit_code)


def _is_users(error: Exception) -> bool:
    """Errors that the user can put right: ChassisError, and a backend asked for that is not there."""
    kernels = sys.modules.get("chassis_kernels.backends")
    return isinstance(error, ChassisError) or (kernels is not None and isinstance(error, kernels.BackendError))
