"""Make the testbed: text, tokenizers, three models, their bits per byte, all written to one folder."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ..text.corpus import Document
from .corpus import standard_library
from .recipe import Recipe, base_config, other_config
from .tokenizers import byte_level, sentencepiece_style
from .train import bits_per_byte, token_stream, train, tuned_cpu


def make(folder: Path, recipe: Recipe, progress: bool) -> None:
    """Write base/, expert/, other_expert/, data/ and, last, manifest.json into `folder`."""
    began = time.perf_counter()
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar, tuned_cpu(min(os.cpu_count() or 1, 8)):
        task = bar.add_task("reading the standard library", total=_work(recipe))

        def stage(text: str) -> None:
            bar.update(task, description=text)

        texts = standard_library()
        _write_documents(folder / "data", texts)
        learn = {domain: splits["train"] for domain, splits in texts.items()}
        unseen = {
            domain: [Document(d.id, d.text[: recipe.evaluation_characters], d.source) for d in splits["test"]]
            for domain, splits in texts.items()
        }
        models: dict[str, dict] = {}

        stage("base: learning prose")
        tokenizer = sentencepiece_style((d.text for d in learn["prose"]), recipe.base_vocabulary)
        streams = {domain: token_stream(tokenizer, learn[domain]) for domain in learn}
        torch.manual_seed(1)
        base = AutoModelForCausalLM.from_config(base_config(recipe, tokenizer))

        def run(name, model, tokenizer, streams, steps, rate, seed, cost):
            started = time.perf_counter()
            train(
                model, streams, steps=steps, learning_rate=rate, batch=recipe.batch, length=recipe.length, seed=seed,
                advance=lambda: bar.advance(task, cost),
            )
            seconds = time.perf_counter() - started
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
            models[name] = {
                "steps": steps,
                "seconds": round(seconds, 1),
                "parameters": sum(p.numel() for p in model.parameters()),
                "vocabulary": len(tokenizer),
                "bits_per_byte": {d: round(bits_per_byte(model, tokenizer, unseen[d], recipe.length), 4) for d in unseen},
            }

        run("base", base, tokenizer, [streams["prose"]], recipe.base_steps, recipe.base_rate, 2, 1.0)
        stage("expert: learning source")
        run("expert", base, tokenizer, [streams["source"]], recipe.expert_steps, recipe.expert_rate, 3, 1.0)
        stage("other expert: learning both")
        other_tokenizer = byte_level((d.text for domain in learn.values() for d in domain), recipe.other_vocabulary)
        torch.manual_seed(4)
        other = AutoModelForCausalLM.from_config(other_config(recipe, other_tokenizer))
        both = [token_stream(other_tokenizer, learn[domain]) for domain in ("source", "prose")]
        run("other_expert", other, other_tokenizer, both, recipe.other_steps, recipe.other_rate, 5, 2.5)
    manifest = {
        "recipe": recipe.as_dict(),
        "seconds": round(time.perf_counter() - began, 1),
        "models": models,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))


def _work(recipe: Recipe) -> float:
    return recipe.base_steps + recipe.expert_steps + 2.5 * recipe.other_steps


def _write_documents(folder: Path, texts: dict[str, dict[str, list[Document]]]) -> None:
    folder.mkdir()
    for domain, splits in texts.items():
        for split, documents in splits.items():
            with open(folder / f"{domain}_{split}.jsonl", "w", encoding="utf-8") as file:
                for d in documents:
                    file.write(json.dumps({"id": d.id, "text": d.text, "source": d.source}) + "\n")
