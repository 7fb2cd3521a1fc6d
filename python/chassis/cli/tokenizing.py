"""`chassis align`: how two tokenizers cut the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chassis.cli import app
from chassis.cli.terminal import Terminal, command
from chassis.errors import ChassisError

COLOURS = ("on dark_green", "on dark_blue")


@command(app, "align")
def align(
    terminal: Terminal,
    student: Annotated[str, typer.Argument(help="Whose tokenizer: a folder or a hub name.")],
    teacher: Annotated[str, typer.Argument(help="The other one.")],
    text: Annotated[list[str] | None, typer.Option("--text", help="What to cut. Repeatable.", show_default=False)] = None,
    file: Annotated[Path | None, typer.Option("--file", help="Read the text from a file.", show_default=False)] = None,
) -> dict:
    """Show which tokens of two tokenizers cover the same text: bars between shared chunks, ≠ and red where they disagree."""
    from chassis.cli.loading import quiet
    from chassis.models import load_tokenizer
    from chassis.text.alignment import align
    from chassis.text.spans import text_spans

    texts = _texts(text or [], file)
    quiet()
    tokenizers = [load_tokenizer(name) for name in (student, teacher)]
    spans = [text_spans(tokenizer, texts) for tokenizer in tokenizers]
    found = align(*spans)
    samples = []
    for row, sample in enumerate(texts):
        sides = {}
        for name, tokenizer, span, ids in zip(("student", "teacher"), tokenizers, spans, found[:2], strict=True):
            kept = span.mask[row]
            pieces = tokenizer.convert_ids_to_tokens(span.ids[row][kept].tolist())
            sides[name] = [{"token": p, "chunk": c} for p, c in zip(pieces, ids[row].numpy()[kept].tolist(), strict=True)]
        n = int(found.num_chunks[row])
        flags = {"valid": found.pair_valid[row][:n].tolist(), "correct": found.pair_is_correct[row][:n].tolist()}
        samples.append({"text": sample, **sides, **flags})
        _print(terminal.console, samples[-1])
    chunks = sum(len(sample["valid"]) for sample in samples)
    correct = sum(sum(sample["correct"]) for sample in samples)
    terminal.console.print(f"{correct} of {chunks} chunks are spelled alike by both")
    return {"samples": samples, "chunks": chunks, "correct": correct}


def _texts(texts: list[str], file: Path | None) -> list[str]:
    if file is not None:
        try:
            texts = [*texts, file.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise ChassisError(f"{file}: cannot be read as UTF-8 text ({error})") from error
    if not texts:
        raise ChassisError("nothing to align: give --text or --file")
    return texts


def _print(console, sample: dict) -> None:
    from rich.text import Text

    for name in ("student", "teacher"):
        line, before = Text(f"{name:<8} "), None
        for item in sample[name]:
            chunk = item["chunk"]
            good = chunk >= 0 and sample["correct"][chunk]
            if chunk != before:
                line.append("" if before is None else "│ ").append("" if good else "≠ ")
            line.append(item["token"], COLOURS[chunk % 2] if good else "white on red").append(" ")
            before = chunk
        console.print(line)
