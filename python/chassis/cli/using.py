"""`chassis eval`, `generate`, `merge`, `export` and `import`: what one does with a fitted adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chassis.cli import app, options
from chassis.cli.terminal import Terminal, command
from chassis.errors import ChassisError


@command(app, "eval")
def evaluate(
    terminal: Terminal,
    adapter: options.AdapterFolder,
    expert: options.Expert,
    data: options.Data,
    base: options.FittedBase = None,
    text_column: options.TextColumn = "text",
    hub_split: options.HubSplit = "train",
    window: options.Window = 128,
    batch_size: options.BatchSize = 16,
    max_tokens: options.ReadTokens = None,
    dtype: options.DType = None,
    device: options.Device = "cpu",
) -> dict:
    """Measure an adapter on documents it was not fitted on: KL beside the no-op KL, top-1 agreement, bits per byte."""
    from chassis import evaluate as evaluation
    from chassis.cli import loading
    from chassis.probes import Probe, check_not_fitted, make_windows
    from chassis.report import print_report

    documents = loading.read_all(data, text_column=text_column, split=hub_split, max_tokens=max_tokens)
    fitted, loaded = loading.adapter_and_base(adapter, base, dtype, device)
    teacher = loading.load_expert(expert, loaded, dtype, device)
    windows = make_windows(documents, loaded.tokenizer, length=window)
    check_not_fitted(adapter, windows)
    windows = windows[: max_tokens and max(1, max_tokens // window)]
    probe = Probe(loaded.model, teacher, (), fitted.config.positions, batch_size)
    with terminal.progress() as report:
        scores = evaluation.evaluate(
            probe,
            windows,
            loaded.readout,
            adapters={"adapter": fitted},
            progress=lambda done: report("evaluate", done, len(windows)),
        )
    results = _results(loaded, teacher, fitted, scores, windows)
    print_report(results, terminal.console)
    return results


@command(app, "generate")
def generate(
    terminal: Terminal,
    prompt: Annotated[list[str], typer.Option("--prompt", help="Text to go on from. Repeatable.")],
    adapter: options.OneAdapter = None,
    plug: options.Plug = None,
    route: Annotated[
        list[str] | None,
        typer.Option(
            "--route",
            help="Who speaks: auto (the least surprised by the prompt), a name, base, or weights such as code=0.7,docs=0.3; "
            "once, or once for each prompt.",
            show_default="auto",
        ),
    ] = None,
    base: options.FittedBase = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens to add.", min=1)] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[float, typer.Option("--temperature", help="Of the draw.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the draw, the same for base and adapted.")] = 0,
    dtype: options.DType = None,
    device: options.Device = "cpu",
) -> dict:
    """Go on from a prompt with the base as it is and with an adapter, or several, side by side.

    `--route auto` takes the one of the base and the plugged adapters that is least surprised by the prompt: under which its
    tokens have the lowest mean negative log-likelihood.
    """
    import torch

    from chassis.cli import loading
    from chassis.report import print_generations
    from chassis.results import continuation, routed_generations

    if temperature <= 0:
        raise ChassisError(f"temperature {temperature}: expected more than 0 (leave out --sample for the likeliest token)")
    if not all(prompt):
        raise ChassisError("the prompt is empty: give some text to go on from")
    if (adapter is None) == (not plug) or (route and not plug):
        raise ChassisError("give one --adapter folder, or --plug name=folder as often as wanted with --route")
    routes = route or ["auto" if plug else "adapter"]
    if len(routes) not in (1, len(prompt)):
        raise ChassisError(f"{len(routes)} routes for {len(prompt)} prompts: give --route once, or once for each prompt")
    folders = loading.plugs(plug) if plug else {"adapter": adapter}
    adapters, loaded = loading.adapters_and_base(folders, base, dtype, device)
    draw = {"do_sample": True, "temperature": temperature} if sample else {}

    def speak(text: str) -> str:
        torch.manual_seed(seed)
        return continuation(loaded.model, loaded.tokenizer, text, max_new_tokens, **draw)

    rows = routed_generations(loaded, adapters, prompt, routes * (len(prompt) // len(routes)), speak)
    print_generations(rows, terminal.console, routes=bool(plug))
    return {"generations": rows}


@command(app, "merge")
def merge(
    terminal: Terminal,
    out: options.NewFolder,
    adapter: options.OneAdapter = None,
    plug: options.Plug = None,
    route: Annotated[
        str | None, typer.Option("--route", help="With --plug: weights such as code=0.7,docs=0.3.", show_default=False)
    ] = None,
    base: options.FittedBase = None,
    bias: Annotated[
        str,
        typer.Option("--bias", help="fold: into the weights, as near as can be; side: exactly, in a file."),
    ] = "fold",
) -> dict:
    """Fold an adapter, or a mixture of several, into a copy of the base: a plain checkpoint that any engine serves at no
    extra cost."""
    from chassis.adapter import Adapter
    from chassis.cli import loading
    from chassis.merge import merge_to

    if (adapter is None) == (not plug) or (route is None) != (not plug):
        raise ChassisError("give one --adapter folder, or --plug name=folder as often as wanted with --route weights")
    loading.quiet()
    fitted = loading.mixture(plug, route) if plug else Adapter.load(adapter)
    return _written(terminal, out, merge_to(base or fitted.config.base, fitted, out, bias=bias))


@command(app, "export")
def export(
    terminal: Terminal,
    adapter: options.AdapterFolder,
    out: options.Folder,
    form: Annotated[str, typer.Option("--format", help="peft: a LoRA on the output head.")] = "peft",
    bias: Annotated[
        str,
        typer.Option("--bias", help="lora: PEFT's lora_bias; fold: one more rank; side: in a file beside."),
    ] = "lora",
    pad: Annotated[bool, typer.Option("--pad", help="Fill the rank up to one that serving engines list.")] = False,
    base: options.FittedBase = None,
) -> dict:
    """Write an adapter in another library's format."""
    from chassis.cli import loading
    from chassis.export import export_peft

    if form != "peft":
        raise ChassisError(f"format {form!r}: expected peft")
    fitted, loaded = loading.adapter_and_base(adapter, base, None, "cpu")
    return _written(terminal, out, export_peft(fitted, loaded.head, out, bias=bias, pad=pad))


@command(app, "import")
def import_(
    terminal: Terminal,
    lora: Annotated[Path, typer.Option("--peft", help="Folder of a PEFT LoRA on the output head alone.")],
    base: options.Model,
    out: options.Folder,
) -> dict:
    """Read a LoRA that PEFT wrote as an adapter, to plug it beside others."""
    from chassis.cli import loading
    from chassis.export import import_peft
    from chassis.models import located

    loaded = loading.load_base(base, None, "cpu")
    adapter = import_peft(lora, loaded.head, base=located(base), vocabulary_hash=loaded.vocabulary_hash)
    adapter.save(out)
    return _written(terminal, out, [])


def _results(base, expert, fitted, scores, windows) -> dict:
    """The part of the report's dictionary that an evaluation alone can fill."""
    from chassis.results import environment

    score, no_op = scores.adapters["adapter"], scores.no_op
    kind = "refined" if fitted.config.refined else "closed form"
    row = {"rank": fitted.rank, "kind": kind, "columns": None if fitted.cols is None else len(fitted.cols)}
    row |= {"kl": score.kl, "stderr": score.stderr, "share_removed": scores.share_removed(score), "top1": score.top1}
    row |= {"bits_per_byte": score.bits_per_byte, "gap_closed": scores.gap_closed(score)}
    row |= {"parameters": fitted.n_parameters, "bytes": fitted.n_bytes}
    bits = {"base": no_op.bits_per_byte, "adapted": score.bits_per_byte, "expert": scores.expert.bits_per_byte}
    return {
        "title": f"{base.name} speaks like {expert.name}",
        "base": base.name,
        "expert": expert.name,
        "positions": fitted.config.positions,
        "rank": fitted.rank,
        "refined": fitted.config.refined,
        "no_op": {"kl": no_op.kl, "stderr": no_op.stderr, "top1": no_op.top1},
        "ranks": [row],
        "bits_per_byte": bits | {"gap_closed": scores.gap_closed(score)},
        "data": {
            "test_documents": len({window.document for window in windows}),
            "test_windows": len(windows),
            "test_tokens": sum(len(window.ids) for window in windows),
        },
        "environment": environment(),
    }


def _written(terminal: Terminal, out: Path, notices: list[str]) -> dict:
    for notice in notices:
        terminal.note(notice)
    terminal.console.print(f"written to {out}", markup=False, highlight=False)
    return {"out": str(out), "notices": notices}
