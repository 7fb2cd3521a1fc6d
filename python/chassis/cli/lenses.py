"""`chassis lens`: fit one onto the model itself, look through one, exchange layouts with other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chassis.cli import app, options
from chassis.cli.terminal import Terminal, command
from chassis.errors import ChassisError

lenses = typer.Typer(help="Read what each layer of a model would say.", no_args_is_help=True)
app.add_typer(lenses, name="lens")

LensFolder = Annotated[
    Path | None, typer.Option("--lens", help="Folder that `chassis fit` or `lens fit` wrote.", show_default=False)
]
Format = Annotated[str, typer.Option("--format", help="tuned-lens or jacobian.")]


@command(lenses, "show")
def show(
    terminal: Terminal,
    text: Annotated[str, typer.Option("--text", help="What the model reads.")],
    lens: LensFolder = None,
    base: Annotated[
        str | None, typer.Option("--base", help="The model; by default the one the lens is of.", show_default=False)
    ] = None,
    expert: Annotated[
        str | None, typer.Option("--expert", help="By default the one the lens was fitted to.", show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Of the text, at most.", min=1)] = 128,
    dtype: options.DType = None,
    device: options.Device = "cpu",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for lens.html.", show_default=False)] = None,
) -> dict:
    """Per layer and position: the top token, entropy, and the KL to what is said in the end.

    Without --lens, the logit lens of --base: each layer as it is through final norm and unembedding.
    """
    from chassis.cli import loading
    from chassis.files import ensure_writable
    from chassis.lens import Lens
    from chassis.lens_view import print_view, view, write_view

    if lens is None and base is None:
        raise ChassisError("give --lens, a folder that a fit wrote, or --base, a model to read with the logit lens")
    found = None if lens is None else Lens.load(_folder(lens))
    if not (base or found.config.base):
        raise ChassisError(f"{lens} does not say which model it is of: give --base")
    if out is not None:
        ensure_writable(out)
    loaded = loading.load_base(base or found.config.base, dtype, device)
    if found is not None:
        found.check_base(width=loaded.head.width, vocabulary_hash=loaded.vocabulary_hash)
    teacher = None
    if found is not None and found.config.target == "final":
        teacher = loading.load_expert(expert or found.config.expert, loaded, dtype, device)
    results = view(loaded, text, found, teacher, max_tokens=max_tokens)
    print_view(results, terminal.console)
    if out is not None:
        terminal.note(f"the whole grid is in {write_view(results, out)}")
    return results


@command(lenses, "fit")
def fit(
    terminal: Terminal,
    base: options.Model,
    data: options.Data,
    out: options.Folder,
    text_column: options.TextColumn = "text",
    hub_split: options.HubSplit = "train",
    alpha: options.Alpha = 1e-4,
    window: options.Window = 128,
    batch_size: options.BatchSize = 16,
    max_tokens: options.ReadTokens = None,
    dtype: options.DType = None,
    device: options.Device = "cpu",
) -> dict:
    """Fit a lens from every layer of a model onto its own last, in one pass: a tuned lens in closed form."""
    from chassis.cli import loading
    from chassis.files import ensure_config_is
    from chassis.lens import FORMAT, LensConfig, fit_self_lens
    from chassis.models import located
    from chassis.probes import make_windows

    ensure_config_is(out, "format", FORMAT)
    documents = loading.read_all(data, text_column=text_column, split=hub_split, max_tokens=max_tokens)
    loaded = loading.load_base(base, dtype, device)
    windows = make_windows(documents, loaded.tokenizer, length=window)[: max_tokens and max(1, max_tokens // window)]
    config = LensConfig(located(base), located(base), loaded.vocabulary_hash)
    with terminal.progress() as report:
        lens = fit_self_lens(loaded.model, windows, alpha, config, batch_size=batch_size,
                             progress=lambda done: report("lens", done, len(windows)))  # fmt: skip
    lens.save(out)
    terminal.console.print(f"written to {out}", markup=False, highlight=False)
    return {"out": str(out), "layers": lens.layers}


@command(lenses, "export")
def export(
    terminal: Terminal,
    lens: Annotated[Path, typer.Option("--lens", help="Folder that `chassis lens fit` wrote.")],
    form: Format,
    out: options.Folder,
) -> dict:
    """Write a lens in the layout of the tuned-lens or the Jacobian lens library."""
    from chassis import lens_formats
    from chassis.lens import Lens

    write = {lens_formats.TUNED: lens_formats.export_tuned, lens_formats.JACOBIAN: lens_formats.export_jacobian}
    notices = _of(write, form)(Lens.load(_folder(lens)), out)
    for notice in notices:
        terminal.note(notice)
    terminal.console.print(f"written to {out}", markup=False, highlight=False)
    return {"out": str(out), "notices": notices}


@command(lenses, "import")
def import_(
    terminal: Terminal,
    source: Annotated[Path, typer.Option("--from", help="Folder or file that the other library wrote.")],
    form: Format,
    out: options.Folder,
    base: Annotated[str, typer.Option("--base", help="The model it is of, where the file does not say.")] = "",
) -> dict:
    """Read a tuned lens or a Jacobian lens."""
    from chassis import lens_formats
    from chassis.models import located

    read = {lens_formats.TUNED: lens_formats.import_tuned, lens_formats.JACOBIAN: lens_formats.import_jacobian}
    lens = _of(read, form)(source)
    lens.config.base = lens.config.expert = located(base or lens.config.base)
    lens.save(out)
    terminal.console.print(f"written to {out}", markup=False, highlight=False)
    return {"out": str(out), "layers": lens.layers}


def _of(choices: dict, form: str):
    if form not in choices:
        raise ChassisError(f"format {form!r}: expected {' or '.join(choices)}")
    return choices[form]


def _folder(lens: Path) -> Path:
    """`chassis fit` keeps its lens in a folder of its own inside its output."""
    inside = lens / "lens"
    return inside if (inside / "lens.safetensors").exists() else lens
