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
PROJECTIONS = ("projection", "counted-projection", "embedding-projection")
COUNTED = ("counted", "jeffrey_counted", "em", "counted-projection")
METHOD_HELP = (
    "A bridge: counted, exact, two_segment, longest_prefix or canonical; jeffrey or jeffrey_counted, which ask the base too "
    "when they are used; em, counted and then raised to the likeliest by running the expert's model (the others need "
    "tokenizers alone). Rows for the distillation loss: projection, counted-projection; embedding-projection, by how alike "
    "the models' unembeddings are."
)
DATA = Annotated[
    list[str] | None, typer.Option("--data", help="Text to count on, as for fit. Repeatable.", show_default=False)
]


@command(bridge_app, "build")
def build(
    terminal: Terminal,
    base: Annotated[str, typer.Argument(help="The base (or student), whose tokens are wanted: a folder or a hub name.")],
    expert: Annotated[str, typer.Argument(help="The expert (or teacher), whose probabilities there are.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File to write, .safetensors; a heat map goes beside it, .png.")
    ] = Path("bridge.safetensors"),
    method: Annotated[str, typer.Option("--method", help=METHOD_HELP)] = "counted",
    data: DATA = None,
    text_column: options.TextColumn = "text",
    hub_split: options.HubSplit = "train",
    max_documents: Annotated[
        int | None, typer.Option("--max-documents", help="Count on so many.", show_default=False)
    ] = None,
    positions: Annotated[
        int, typer.Option("--positions", help="em: places of the text to run the expert on.", min=1)
    ] = 60000,
    dtype: options.DType = None,
    device: options.Device = "cpu",
) -> dict:
    """Build a bridge (or a projection for distillation) between two tokenizers, and say what they share."""
    from chassis.bridge.coverage import bridge_links, projection_links
    from chassis.bridge.projection_file import notices
    from chassis.bridge.report import coverage_table
    from chassis.cli.loading import quiet
    from chassis.files import ensure_writable
    from chassis.page import Row, Table
    from chassis.text.corpus import load_documents

    if method in COUNTED and not data:
        raise ChassisError(f"method {method} needs text to count on: give --data, or --method canonical (projection)")
    if out.suffix != ".safetensors":
        raise ChassisError(f"--out {out}: bridges and projections are .safetensors files; a heat map, .png, goes beside")
    ensure_writable(out.parent)
    quiet()
    documents = load_documents(data, text_column=text_column, split=hub_split, limit=max_documents) if data else ()
    texts = (d.text for d in documents)
    if method in PROJECTIONS:
        projection, sides = _projection(base, expert, method, texts, out, dtype, device)
        found = projection.report()._asdict()
        rows = [Row([name.replace("_", " "), f"{value:,.4g}"]) for name, value in found.items()]
        links, table = projection_links(projection, *sides), Table("The projection", ["what", "value"], rows)
        return _show_build(terminal, table, links, out, notices(projection)) | {"projection": found}
    with terminal.progress() as report:
        bridge = _bridge(base, expert, method, texts, report, positions, dtype, device)
    bridge.save(out)
    coverage = bridge.coverage()
    links = bridge_links(bridge.table, bridge.expert, bridge.base)
    return _show_build(terminal, coverage_table(coverage), links, out, []) | {"coverage": coverage}


def _projection(student: str, teacher: str, method: str, texts, out: Path, dtype: str | None, device: str):
    from chassis.bridge.projection import build_projection, counted_projection, embedding_projection
    from chassis.bridge.projection_file import save_projection
    from chassis.cli.loading import load_model
    from chassis.models import load_tokenizer, vocabulary_hash
    from chassis.text.token_bytes import TokenBytes

    tokenizers = [load_tokenizer(name) for name in (student, teacher)]
    sides = [TokenBytes.from_tokenizer(tokenizer) for tokenizer in tokenizers]
    if method == "embedding-projection":
        models = [load_model(name, dtype, device)[0] for name in (student, teacher)]
        projection = embedding_projection(*sides, *(model.get_output_embeddings().weight for model in models))
    else:
        projection = build_projection(*sides) if method == "projection" else counted_projection(*sides, texts)
    save_projection(projection, out, hashes=tuple(vocabulary_hash(t) for t in tokenizers))
    return projection, sides


def _bridge(base: str, expert: str, method: str, texts, report, positions: int, dtype: str | None, device: str):
    from chassis.bridge import Bridge, likeliest
    from chassis.bridge.loading import Side, tokens_of
    from chassis.cli import loading

    if method != "em":
        return Bridge.build(tokens_of(expert), tokens_of(base), method, texts)
    texts, side = list(texts), Side(*loading.load_model(expert, dtype, device), expert)
    counted = Bridge.build(side.tokens, tokens_of(base), "counted", texts)
    return likeliest(counted, texts, side.read, positions=positions, progress=report)


def _show_build(terminal: Terminal, table, links, out: Path, notes: list[str]) -> dict:
    from chassis.bridge.coverage import heat_map, sample_rows
    from chassis.files import write_file
    from chassis.page import Row, Table, print_tables

    sample = Table("Some rows", list(links.names), [Row(cells) for cells in sample_rows(links)])
    print_tables([table, sample], terminal.console)
    for note in notes:
        terminal.note(note)
    picture = write_file(out.with_suffix(".png"), heat_map(links))
    terminal.console.print(f"written to {out}, with a heat map in {picture.name}", markup=False, highlight=False)
    return {"out": str(out), "heat_map": str(picture)}


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
    semantic: Annotated[
        bool, typer.Option("--semantic", help="Also maps between the two unembeddings and between hidden states.")
    ] = False,
    em: Annotated[int, typer.Option("--em", help="Also the likeliest table: places of --data to read with the expert.")] = 0,
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
        settings |= {"semantic": semantic, "em": em}
        results = compare(*sides, main, documents, progress=report, **settings)
    return show(terminal, results, out)


def show(terminal: Terminal, results: dict, out: Path) -> dict:
    from chassis.bridge.report import print_report, write_report

    page = write_report(results, out)
    print_report(results, terminal.console)
    terminal.note(f"{page.name} is in {out}")
    return results | {"out": str(out)}


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
