"""Make the testbed: text, tokenizers, three models and their bits per byte, all written to one folder."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
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

OTHER_STEP = 2.4  # time of a step of the other expert in steps of the base, for the progress bar
Advance = Callable[[float], None]


def make(folder: Path, recipe: Recipe, progress: bool) -> None:
    """Write base/, expert/, other_expert/, data/ and, last, manifest.json into `folder`.

    Base and expert are trained in one thread, the other expert beside them in a second one, each with half of the cores:
    as quick as one after the other on all cores, and much quicker where other programs want the cores as well.
    """
    began = time.perf_counter()
    with _progress_bar(recipe, progress) as advance, tuned_cpu(), _silent_transformers():
        texts = standard_library()
        _write_documents(folder / "data", texts)
        teacher = Teacher(folder, recipe, texts, advance)
        models = _run_together(teacher.stopped, teacher.base_and_expert, teacher.other_expert)
    manifest = {
        "seconds": round(time.perf_counter() - began, 1),
        "models": models,
        "documents": {d: {s: len(documents) for s, documents in splits.items()} for d, splits in texts.items()},
        "recipe": recipe.as_dict(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))


class Teacher:
    """Trains, measures and saves the models; both methods return the manifest's entries by name of the model."""

    def __init__(self, folder: Path, recipe: Recipe, texts: dict[str, dict[str, list[Document]]], advance: Advance):
        self.folder, self.recipe, self.advance = folder, recipe, advance
        self.learn = {domain: splits["train"] for domain, splits in texts.items()}
        self.unseen = {domain: _openings(splits["test"], recipe.scored_characters) for domain, splits in texts.items()}
        self.stopped = threading.Event()
        self.threads = max(torch.get_num_threads() // 2, 1)
        self.tokenizer = sentencepiece_style(_texts(self.learn["prose"]), recipe.base_vocabulary)
        self.other_tokenizer = byte_level(_texts(*self.learn.values()), recipe.other_vocabulary)
        self.base_model = _new_model(base_config(recipe, self.tokenizer), seed=1)
        self.other_model = _new_model(other_config(recipe, self.other_tokenizer), seed=4)

    def base_and_expert(self) -> dict[str, dict]:
        model, tokenizer, recipe = self.base_model, self.tokenizer, self.recipe
        return {
            "base": self.teach("base", model, tokenizer, ("prose",), recipe.base, 2),
            "expert": self.teach("expert", model, tokenizer, ("source",), recipe.expert, 3),
        }

    def other_expert(self) -> dict[str, dict]:
        model, tokenizer, schedule = self.other_model, self.other_tokenizer, self.recipe.other_expert
        return {"other_expert": self.teach("other_expert", model, tokenizer, ("source", "prose"), schedule, 5, OTHER_STEP)}

    def teach(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        domains: tuple[str, ...],
        schedule: Schedule,
        seed: int,
        step: float = 1.0,
    ) -> dict:
        def advance() -> None:
            if self.stopped.is_set():
                raise CancelledError
            self.advance(step)

        torch.set_num_threads(self.threads)
        started = time.perf_counter()
        streams = [token_stream(tokenizer, self.learn[domain]) for domain in domains]
        train(model, streams, schedule, self.recipe.batch, self.recipe.length, seed, advance)
        model.save_pretrained(self.folder / name)
        tokenizer.save_pretrained(self.folder / name)
        seconds = time.perf_counter() - started
        score = {d: bits_per_byte(model, tokenizer, texts, self.recipe.length) for d, texts in self.unseen.items()}
        return {
            "architecture": model.config.model_type,
            "trained_on": list(domains),
            "steps": schedule.steps,
            "seconds": round(seconds, 1),
            "parameters": sum(p.numel() for p in model.parameters()),
            "vocabulary": len(tokenizer),
            "width": model.config.hidden_size,
            "layers": model.config.num_hidden_layers,
            "bits_per_byte": {domain: round(bits, 4) for domain, bits in score.items()},
        }


def _run_together(stopped: threading.Event, *jobs: Callable[[], dict]) -> dict:
    """Run the jobs in threads and join their results; when one fails, or the user interrupts, all stop."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            stopped.set()
    return {name: entry for future in futures for name, entry in future.result().items()}


def _new_model(config, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _texts(*groups: list[Document]) -> Iterator[str]:
    return (document.text for group in groups for document in group)


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
def _progress_bar(recipe: Recipe, shown: bool) -> Iterator[Advance]:
    """A function that advances the bar by so many steps of the base."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        total = recipe.base.steps + recipe.expert.steps + OTHER_STEP * recipe.other_expert.steps
        task = bar.add_task("training the testbed, once", total=total)
        yield lambda steps: bar.advance(task, steps)


@contextmanager
def _silent_transformers() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
