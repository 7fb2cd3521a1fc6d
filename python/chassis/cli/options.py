"""Options that several commands take, in one spelling."""

from pathlib import Path
from typing import Annotated

import typer

Base = Annotated[str, typer.Option("--base", help="The model that is adapted: a folder or a hub name.")]
Model = Annotated[str, typer.Option("--base", help="The model: a folder or a hub name.")]
FittedBase = Annotated[
    str | None, typer.Option("--base", help="The base; by default the one the adapter was fitted on.", show_default=False)
]
Expert = Annotated[
    str,
    typer.Option(
        "--expert",
        help="The model it shall speak like: a folder or a hub name with the base's tokenizer, or a logit bias such as "
        "bias:word=2.5,other=-3.",
    ),
]
Bridge = Annotated[
    str | None,
    typer.Option(
        "--bridge",
        help="For an expert with another tokenizer: auto counts a bridge on --data, or a file of `chassis bridge build`.",
        show_default=False,
    ),
]
Init = Annotated[
    str | None,
    typer.Option(
        "--init",
        help="With --bridge, where the adapter starts: newton, one Gauss-Newton step on the KL; semantic, the change that "
        "the expert's hidden states foretell; both (the default), the shares of the two that are best on validation.",
        show_default=False,
    ),
]
Data = Annotated[
    list[str],
    typer.Option("--data", help=".txt, .md, .py, .jsonl, .parquet, a folder of them, hf://owner/name[:config]. Repeatable."),
]
Validation = Annotated[
    list[str] | None,
    typer.Option("--validation", help="Documents to choose on; by default a tenth of --data, by hash.", show_default=False),
]
Test = Annotated[
    list[str] | None,
    typer.Option("--test", help="Documents to measure on; by default a tenth of --data, by hash.", show_default=False),
]
TextColumn = Annotated[str, typer.Option("--text-column", help="Where the text is in .jsonl, .parquet and hub rows.")]
HubSplit = Annotated[str, typer.Option("--hub-split", help="Which split of a hub dataset to read.")]
Columns = Annotated[
    int | None, typer.Option("--columns", help="Change only this many tokens' logits; by default all.", show_default=False)
]
Alpha = Annotated[float, typer.Option("--alpha", help="Ridge, relative to the mean eigenvalue of the Gram matrix.")]
Layers = Annotated[str, typer.Option("--layers", help="Layers to fit a lens for: all, none or 0,4,8.")]
Positions = Annotated[str, typer.Option("--positions", help="Tokens to fit on: all, or the last of each window.")]
Window = Annotated[int, typer.Option("--window", help="Tokens a model sees at a time.", min=2)]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Windows in a forward pass.", min=1)]
Refine = Annotated[bool, typer.Option("--refine/--no-refine", help="Improve the closed form by gradient steps on the KL.")]
RefineSteps = Annotated[int, typer.Option("--refine-steps", help="How many of those steps.", min=0)]
ReadTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", help="Read at most this many tokens; by default all.", min=1, show_default=False),
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", help="Fit on at most this many tokens; by default on all.", min=1, show_default=False),
]
MaxTestTokens = Annotated[int, typer.Option("--max-test-tokens", help="Measure on at most this many tokens.", min=1)]
DType = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16, ...; by default the checkpoint's own.", show_default=False)
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")]
Folder = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")]
NewFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder to write, new or empty.")]
AdapterFolder = Annotated[Path, typer.Option("--adapter", help="Folder that `chassis fit` wrote.")]
OneAdapter = Annotated[Path | None, typer.Option("--adapter", help="Folder that `chassis fit` wrote.", show_default=False)]
Plug = Annotated[
    list[str] | None, typer.Option("--plug", help="Several of them, as name=folder. Repeatable.", show_default=False)
]
