"""Make the testbed: text, tokenizers, three models and their bits per byte, all written to one folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers.utils.logging as transformers_logging
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from chassis.testbed.corpus import standard_library
from chassis.testbed.recipe import Recipe, Schedule, base_config, other_config
from chassis.testbed.tokenizers import byte_level, sentencepiece_style
from chassis.testbed.train import bits_per_byte, token_stream, train, tuned_cpu
from chassis.text.corpus import Document

OTHER_STEP = 2.3  # time of a step of the other expert in steps of the base, for the progress bar


def make(folder: Path, recipe: Recipe, progress: bool) -> None:
    """Write base/, expert/, other_expert/, data/ and, last, manifest.json into `folder`."""
    began = time.perf_counter()
    with _progress_bar(recipe, progress) as (stage, advance), tuned_cpu(), _silent_transformers():
        stage("reading the standard library")
        texts = standard_library()
        _write_documents(folder / "data", texts)
        learn = {domain: splits["train"] for domain, splits in texts.items()}
        unseen = {domain: _openings(splits["test"], recipe.scored_characters) for domain, splits in texts.items()}
        models = {}

        def teach(
            name: str,
            model: PreTrainedModel,
            tokenizer: PreTrainedTokenizerFast,
            domains: tuple[str, ...],
            schedule: Schedule,
            seed: int,
            step: float,
        ) -> None:
            stage(f"{name.replace('_', ' ')}: learning {' and '.join(domains)}")
            started = time.perf_counter()
            streams = [token_stream(tokenizer, learn[domain]) for domain in domains]
            train(model, streams, schedule, recipe.batch, recipe.length, seed, lambda: advance(step))
            models[name] = {
                "architecture": model.config.model_type,
                "steps": schedule.steps,
                "seconds": round(time.perf_counter() - started, 1),
                "parameters": sum(p.numel() for p in model.parameters()),
                "vocabulary": len(tokenizer),
                "width": model.config.hidden_size,
                "layers": model.config.num_hidden_layers,
                "bits_per_byte": {d: round(bits_per_byte(model, tokenizer, unseen[d], recipe.length), 4) for d in unseen},
            }
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)

        tokenizer = sentencepiece_style((d.text for d in learn["prose"]), recipe.base_vocabulary)
        model = _new_model(base_config(recipe, tokenizer), seed=1)
        teach("base", model, tokenizer, ("prose",), recipe.base, 2, 1.0)
        teach("expert", model, tokenizer, ("source",), recipe.expert, 3, 1.0)
        tokenizer = byte_level((d.text for documents in learn.values() for d in documents), recipe.other_vocabulary)
        model = _new_model(other_config(recipe, tokenizer), seed=4)
        teach("other_expert", model, tokenizer, ("source", "prose"), recipe.other_expert, 5, OTHER_STEP)

    manifest = {
        "seconds": round(time.perf_counter() - began, 1),
        "models": models,
        "documents": {d: {s: len(documents) for s, documents in splits.items()} for d, splits in texts.items()},
        "recipe": recipe.as_dict(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))


def _new_model(config, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _openings(documents: list[Document], characters: int) -> list[Document]:
    """A little of every document measures a model better than all of a few."""
    return [Document.from_text(d.text[:characters], d.source) for d in documents]


def _write_documents(folder: Path, texts: dict[str, dict[str, list[Document]]]) -> None:
    folder.mkdir()
    for domain, splits in texts.items():
        for split, documents in splits.items():
            with open(folder / f"{domain}_{split}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps({"id": d.id, "text": d.text, "source": d.source}) + "\n" for d in documents)


@contextmanager
def _progress_bar(recipe: Recipe, shown: bool) -> Iterator[tuple[Callable[[str], None], Callable[[float], None]]]:
    """Two functions: name the stage, and advance by so many base steps."""
    columns = (TextColumn("{task.description:<40}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        total = recipe.base.steps + recipe.expert.steps + OTHER_STEP * recipe.other_expert.steps
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, description=text), lambda steps: bar.advance(task, steps)


@contextmanager
def _silent_transformers() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
