"""`chassis bridge build` and `chassis bridge eval`: from one tokenizer's probabilities to another's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chassis.cli import app, options
from chassis.cli.terminal import Terminal, command
from chassis.errors import ChassisError

bridge_app = typer.Typer(help="Carry a model's probabilities over to another tokenizer.", no_args_is_help=True)
app.add_typer(bridge_app, name="bridge")
COUNTED, PROJECTIONS = ("counted", "counted-projection"), ("projection", "counted-projection")
DATA = Annotated[
    list[str] | None, typer.Option("--data", help="Text to count on, as for fit. Repeatable.", show_default=False)
]


@command(bridge_app, "build")
def build(
    terminal: Terminal,
    base: Annotated[str, typer.Argument(help="The base (or student), whose tokens are wanted: a folder or a hub name.")],
    expert: Annotated[str, typer.Argument(help="The expert (or teacher), whose probabilities there are.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, .safetensors.")] = Path("bridge.safetensors"),
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="counted, exact, two_segment, longest_prefix or canonical: a bridge. projection or counted-projection: "
            "rows for the distillation loss.",
        ),
    ] = "counted",
    data: DATA = None,
    text_column: options.TextColumn = "text",
    hub_split: options.HubSplit = "train",
    max_documents: Annotated[
        int | None, typer.Option("--max-documents", help="Count on so many.", show_default=False)
    ] = None,
) -> dict:
    """Build a bridge (or a projection for distillation) between two tokenizers, and say what they share."""
    from chassis.bridge.projection import build_projection, counted_projection
    from chassis.bridge.projection_file import notices, save_projection
    from chassis.bridge.report import coverage_table
    from chassis.cli.loading import quiet
    from chassis.models import load_tokenizer, vocabulary_hash
    from chassis.page import Row, Table, print_tables
    from chassis.text.corpus import load_documents
    from chassis.text.token_bytes import TokenBytes

    if method in COUNTED and not data:
        raise ChassisError(f"method {method} needs text to count on: give --data, or --method canonical (projection)")
    quiet()
    texts = (
        (d.text for d in load_documents(data, text_column=text_column, split=hub_split, limit=max_documents)) if data else ()
    )
    tokenizers = [load_tokenizer(name) for name in (base, expert)]
    tokens = [TokenBytes.from_tokenizer(tokenizer) for tokenizer in tokenizers]
    if method not in PROJECTIONS:
        from chassis.bridge import Bridge

        bridge = Bridge.build(tokens[1], tokens[0], method, texts if method == "counted" else None)
        bridge.save(out)
        coverage = bridge.coverage()
        print_tables([coverage_table(coverage)], terminal.console)
        return _written(terminal, out, {"coverage": coverage})
    projection = build_projection(*tokens) if method == "projection" else counted_projection(*tokens, texts)
    save_projection(projection, out, hashes=tuple(vocabulary_hash(t) for t in tokenizers))
    found = projection.report()._asdict()
    rows = [Row([name.replace("_", " "), f"{value:,.4g}"]) for name, value in found.items()]
    sample = [Row([_shown(tokens[0].bytes[i]), _entries(projection, i, tokens[1])]) for i in _samples(projection)]
    tables = [Table("The projection", ["what", "value"], rows), Table("Some rows", ["student", "teacher"], sample)]
    print_tables(tables, terminal.console)
    for notice in notices(projection):
        terminal.note(notice)
    return _written(terminal, out, {"projection": found})


@command(bridge_app, "eval")
def evaluate(
    terminal: Terminal,
    base: options.Base,
    expert: Annotated[str, typer.Option("--expert", help="A model with any tokenizer: a folder or a hub name.")],
    data: options.Data,
    validation: options.Validation = None,
    test: options.Test = None,
    bridge: Annotated[str, typer.Option("--bridge", help="auto: count one on --data; or a file of bridge build.")] = "auto",
    lookahead: Annotated[
        str, typer.Option("--lookahead", help="Evaluations a position, such as 4,16.", show_default=False)
    ] = "",
    reference: Annotated[int, typer.Option("--reference", help="Evaluations of the KL's reference; 0: no KL.")] = 0,
    max_windows: Annotated[int, typer.Option("--max-windows", help="Windows to measure on.", min=1)] = 64,
    text_column: options.TextColumn = "text",
    hub_split: options.HubSplit = "train",
    window: options.Window = 128,
    dtype: options.DType = None,
    device: options.Device = "cpu",
    out: options.Out = Path("bridge-report"),
) -> dict:
    """Measure a bridge on held-out text beside the estimators it replaces, the expert's own tokens and the base alone."""
    from chassis.bridge.loading import Side, bridge_for, compare
    from chassis.cli import loading
    from chassis.files import ensure_writable

    ensure_writable(out)
    looks = loading.parse_numbers("lookahead", lookahead, "numbers such as 4,16") if lookahead else ()
    sources = {"text_column": text_column, "split": hub_split, "max_tokens": None}
    documents = loading.read_documents(data, validation, test, **sources)
    sides = [Side(*loading.load_model(name, dtype, device), name) for name in (base, expert)]
    main = bridge_for(*sides, bridge, [d.text for d in documents["fit"]])
    with terminal.progress() as report:
        settings = {"looks": looks, "reference": reference, "window": window, "max_windows": max_windows}
        results = compare(*sides, main, documents, progress=report, **settings)
    return show(terminal, results, out)


def show(terminal: Terminal, results: dict, out: Path) -> dict:
    from chassis.bridge.report import print_report, write_report

    page = write_report(results, out)
    print_report(results, terminal.console)
    terminal.note(f"{page.name} is in {out}")
    return results | {"out": str(out)}


def _written(terminal: Terminal, out: Path, found: dict) -> dict:
    terminal.console.print(f"written to {out}", markup=False, highlight=False)
    return found | {"out": str(out)}


def _samples(projection, n: int = 12) -> list[int]:
    """Rows with several entries, evenly spread, and a few with one."""
    many = (projection.indices[:, 1:2] >= 0).any(1).nonzero()[:, 0].tolist() or list(range(projection.n_student))
    return many[:: max(1, len(many) // n)][:n]


def _entries(projection, row: int, teacher) -> str:
    pairs = zip(projection.indices[row].tolist(), projection.weights[row].tolist(), strict=True)
    return "  ".join(f"{_shown(teacher.bytes[i])} {weight:.3f}" for i, weight in pairs if i >= 0)


def _shown(data: bytes) -> str:
    return repr(data.decode(errors="backslashreplace"))


@command(app, "ensemble")
def ensemble(
    terminal: Terminal,
    base: options.Base,
    expert: Annotated[str, typer.Option("--expert", help="A model with any tokenizer: a folder or a hub name.")],
    prompt: Annotated[list[str], typer.Option("--prompt", help="Text to go on from. Repeatable.")],
    bridge: Annotated[str, typer.Option("--bridge", help="auto: count one on --data; or a file of bridge build.")] = "auto",
    data: DATA = None,
    mix: Annotated[float, typer.Option("--mix", help="Weight of the base, 0 to 1.")] = 0.2,
    lookahead: Annotated[int, typer.Option("--lookahead", help="Evaluations of the expert a token.", min=0)] = 0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens to add.", min=1)] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the draw.")] = 0,
    dtype: options.DType = None,
    device: options.Device = "cpu",
) -> dict:
    """Decode with the base and an expert of another tokenizer at once, through a bridge."""
    import torch

    from chassis.bridge.ensemble import speak
    from chassis.bridge.loading import AUTO, Side, bridge_for
    from chassis.cli import loading
    from chassis.report import print_generations
    from chassis.text.corpus import load_documents

    if bridge == AUTO and not data:
        raise ChassisError("--bridge auto needs text to count on: give --data, or a file of chassis bridge build")
    sides = [Side(*loading.load_model(name, dtype, device), name) for name in (base, expert)]
    found = bridge_for(*sides, bridge, [d.text for d in load_documents(data)] if data else ())
    rows = []
    for text in prompt:
        said = {}
        for name, weight in (("base", 1.0), ("expert", 0.0), ("both", mix)):
            generator = torch.Generator().manual_seed(seed) if sample else None
            settings = {"weight": weight, "max_new_tokens": max_new_tokens, "evaluations": lookahead}
            said[name] = speak(*sides, found, text, generator=generator, **settings)
        rows.append({"prompt": text} | said)
    print_generations(rows, terminal.console)
    return {"generations": rows}
