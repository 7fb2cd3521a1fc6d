"""`chassis fit`, `chassis sweep` and `chassis demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chassis.cli import app, options
from chassis.cli.terminal import Terminal, command
from chassis.errors import ChassisError


@command(app, "fit", resumes=True)
def fit(
    terminal: Terminal,
    base: options.Base,
    expert: options.Expert,
    data: options.Data,
    bridge: options.Bridge = None,
    init: options.Init = None,
    validation: options.Validation = None,
    test: options.Test = None,
    text_column: options.TextColumn = "text",
    hub_split: options.HubSplit = "train",
    rank: Annotated[int, typer.Option("--rank", help="Rank of the adapter.")] = 32,
    columns: options.Columns = None,
    alpha: options.Alpha = 1e-4,
    layers: options.Layers = "all",
    positions: options.Positions = "all",
    window: options.Window = 128,
    batch_size: options.BatchSize = 16,
    refine: options.Refine = True,
    refine_steps: options.RefineSteps = 60,
    max_tokens: options.MaxTokens = None,
    max_test_tokens: options.MaxTestTokens = 65536,
    dtype: options.DType = None,
    device: options.Device = "cpu",
    out: options.Out = Path("out"),
) -> dict:
    """Fit an adapter that makes a base model speak like an expert, and report on held-out text.

    Writes the adapter, the lens of each layer and report.html into the output folder. A fit that was stopped goes on where
    it was when the same command is given again.
    """
    steps = refine_steps if refine else 0
    settings = {"rank": rank, "columns": columns, "alpha": alpha, "positions": positions, "window": window}
    settings |= {"batch_size": batch_size, "refine_steps": steps, "layers": layers, "init": init}
    sources = {"data": data, "validation": validation, "test": test, "text_column": text_column, "split": hub_split}
    return _fit(terminal, base, expert, bridge, sources, settings, (max_tokens, max_test_tokens), dtype, device, out)


@command(app, "sweep", resumes=True)
def sweep(
    terminal: Terminal,
    base: options.Base,
    expert: options.Expert,
    data: options.Data,
    bridge: options.Bridge = None,
    init: options.Init = None,
    validation: options.Validation = None,
    test: options.Test = None,
    text_column: options.TextColumn = "text",
    hub_split: options.HubSplit = "train",
    ranks: Annotated[str, typer.Option("--ranks", help="Ranks to compare, from one pass over the text.")] = "4,8,16,32,64",
    rank: Annotated[int, typer.Option("--rank", help="The rank to save; by default the largest.", show_default=False)] = 0,
    columns: options.Columns = None,
    alpha: options.Alpha = 1e-4,
    layers: options.Layers = "all",
    positions: options.Positions = "all",
    window: options.Window = 128,
    batch_size: options.BatchSize = 16,
    refine: options.Refine = True,
    refine_steps: options.RefineSteps = 60,
    max_tokens: options.MaxTokens = None,
    max_test_tokens: options.MaxTestTokens = 65536,
    dtype: options.DType = None,
    device: options.Device = "cpu",
    out: options.Out = Path("out"),
) -> dict:
    """Fit adapters of several ranks from one pass and one factorisation, and compare them on held-out text."""
    from chassis.cli.loading import parse_numbers

    compared = parse_numbers("ranks", ranks, "numbers such as 4,8,16")
    steps = refine_steps if refine else 0
    settings = {"rank": rank or max(compared), "ranks": compared, "columns": columns, "alpha": alpha, "positions": positions}
    settings |= {"window": window, "batch_size": batch_size, "refine_steps": steps, "layers": layers, "init": init}
    sources = {"data": data, "validation": validation, "test": test, "text_column": text_column, "split": hub_split}
    return _fit(terminal, base, expert, bridge, sources, settings, (max_tokens, max_test_tokens), dtype, device, out)


@command(app, "demo")
def demo(
    terminal: Terminal,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path("chassis-demo"),
) -> dict:
    """Train three small models on Python's own library, then fit, measure and speak: the whole job in a few minutes.

    The second chapter does it again with an expert of another tokenizer, through a bridge; the third plugs both adapters
    into the one base.
    """
    from chassis.cli import bridging, loading
    from chassis.demo import run_bridge_demo, run_demo, run_port_demo, same_by_hand
    from chassis.files import ensure_writable
    from chassis.testbed import build

    ensure_writable(out)
    loading.quiet()
    testbed = build()
    with terminal.progress() as report:
        results = run_demo(testbed, out, report)
    shown = _show(terminal, results, out)
    terminal.note(f"the same by hand: {same_by_hand(testbed)}")
    with terminal.progress() as report:
        ladder, bridged = run_bridge_demo(testbed, out / "bridge", report)
    ladder = bridging.show(terminal, ladder, out / "bridge")
    bridged = _show(terminal, bridged, out / "bridge")
    ported = run_port_demo(testbed, out)
    _show_port(terminal, ported, out)
    return shown | {"ladder": ladder, "bridge": bridged, "port": ported}


def _show_port(terminal: Terminal, results: dict, out: Path) -> None:
    from chassis.page import Row, Table, number, print_tables
    from chassis.report import print_generations

    nats = results["nats"]
    rows = [Row([who, *(number(scores[who]) for scores in nats.values())]) for who in next(iter(nats.values()))]
    print_tables([Table("Both on one base: nats per token", ["speaks", *nats], rows)], terminal.console)
    print_generations(results["generations"], terminal.console, routes=True)
    terminal.note(
        f"the same by hand: chassis generate --plug code={out} --plug bridged={out / 'bridge'} --route auto --prompt ..."
    )


def _fit(terminal, base, expert, bridge, sources, settings, limits, dtype, device, out) -> dict:
    from chassis.adapter import FORMAT
    from chassis.cli import loading
    from chassis.files import ensure_config_is
    from chassis.fit import FitOptions
    from chassis.fit import fit as run
    from chassis.results import measure, summarise

    ensure_config_is(out, "format", FORMAT)
    if settings["init"] is None:
        del settings["init"]
    elif bridge is None:
        raise ChassisError(f"--init {settings['init']} is for a fit through a bridge: give --bridge too, or leave it out")
    settings["layers"] = loading.parse_layers(settings["layers"])
    names = ("max_windows", "max_test_windows")
    settings |= {name: max(1, n // settings["window"]) for name, n in zip(names, limits, strict=True) if n is not None}
    documents = loading.read_documents(**sources, max_tokens=limits[0])
    terminal.note(f"read {sum(map(len, documents.values()))} documents; loading {base} and {expert}")
    loaded = loading.load_base(base, dtype, device)
    teacher = loading.load_expert(expert, loaded, dtype, device, bridge, [d.text for d in documents["fit"]])
    with terminal.progress() as report:
        result = run(loaded, teacher, documents, FitOptions(**settings), out=out, progress=report)
        scores = measure(loaded, teacher, result, report)
    if result.closed.weights:
        terminal.note("starts from " + " and ".join(f"{v:g} of the {k}" for k, v in result.closed.weights.items() if v))
    prompts = loading.prompts(loaded.tokenizer, result.windows["test"])
    return _show(terminal, summarise(loaded, teacher, result, scores, prompts, f"{base} speaks like {expert}"), out)


def _show(terminal: Terminal, results: dict, out: Path) -> dict:
    from chassis.report import print_report, write_report

    page = write_report(results, out)
    print_report(results, terminal.console)
    terminal.note(f"adapter, lens and {page.name} are in {out}")
    return results | {"out": str(out)}
