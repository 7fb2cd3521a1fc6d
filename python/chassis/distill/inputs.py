"""What a distillation reads: samples of text, both sides' tokenizers, projections, teachers and their caches."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from chassis.bridge.projection import build_projection, counted_projection
from chassis.bridge.projection_file import load_projection
from chassis.distill.cache import Cache, read_index, write_cache
from chassis.distill.collator import Collator
from chassis.distill.config import DistillConfig
from chassis.distill.config import Teacher as TeacherOptions
from chassis.distill.packing import pack
from chassis.distill.teachers import CachedTeacher, LiveTeacher, Teacher
from chassis.errors import ChassisError, ModelError
from chassis.models import Head, inspect_head, load_causal_lm, load_tokenizer, vocabulary_hash
from chassis.text.corpus import load_documents
from chassis_kernels import SparseProjection, XTokenConfig
from chassis_kernels.xtoken_loss import needs_logits

Progress = Callable[[str, int, int], None]  # stage, done, total
BUILT = ("auto", "counted", "tokenizers")


@dataclass
class Sides:
    """The tokenizers of a run. `tokenizers[i]` is None where teacher i has the student's own."""

    student: object
    tokenizers: list[object | None]
    projections: list[SparseProjection | None]
    loss: XTokenConfig

    @property
    def exact_only(self) -> list[bool]:
        """Whether a teacher's loss counts only chunks that both sides spell alike."""
        return [self.loss.exact_token_match_only and not self.loss.uses_gold(i) for i in range(len(self.tokenizers))]


def load_sides(config: DistillConfig, student, texts: Iterable[str]) -> Sides:
    """The teachers' tokenizers and projections; the loss's configuration with their sizes. `texts`: to count on."""
    own = vocabulary_hash(student)
    tokenizers, projections, sizes, same = [], [], [], []
    for i, teacher in enumerate(config.teachers):
        tokenizer = _tokenizer(teacher)
        shared = vocabulary_hash(tokenizer) == own
        if teacher.projection is None and not shared:
            raise ChassisError(
                f"teachers.{i}: projection is null, but {teacher.model or teacher.cache} ({len(tokenizer)} tokens) and the "
                f"student ({len(student)} tokens) have different vocabularies; write projection: auto"
            )
        shared = shared and teacher.projection in (None, *BUILT)
        tokenizers.append(None if shared else tokenizer)
        gold = config.loss.gold_loss if teacher.gold_loss is None else teacher.gold_loss
        projections.append(None if shared else _projection(teacher.projection, student, tokenizer, gold, texts))
        sizes.append(len(tokenizer))
        same.append(shared)
    return Sides(student, tokenizers, projections, config.loss_config(len(student), sizes, same))


def datasets(config: DistillConfig, tokenizer) -> tuple[Dataset, Dataset | None]:
    """Packed samples to train on and to measure on: {text, index, sample_mask}.

    The validation samples are filled up, with copies that do not count, to whole micro-batches on every rank.
    """
    data, training = config.data, config.training
    options = {"text_column": data.text_column, "split": data.split}

    def samples(sources: Sequence[str]) -> list[dict]:
        documents = load_documents(sources, **options, limit=data.max_documents)
        texts = pack(documents, data.pack_length, data.pack_by, tokenizer)
        return [{"text": text, "index": i, "sample_mask": 1.0} for i, text in enumerate(texts)]

    train = samples(data.train)
    if len(train) < training.batch_size:
        raise ChassisError(
            f"{len(train)} samples of text, but training.batch_size is {training.batch_size}: give more text, or a smaller "
            "batch or data.pack_length"
        )
    if not data.validation:
        return Dataset.from_list(train), None
    validation = samples(data.validation)[: data.max_validation_samples]
    multiple = training.micro_batch_size * int(os.environ.get("WORLD_SIZE", 1))
    while len(validation) % multiple:
        validation.append(validation[0] | {"sample_mask": 0.0})
    return Dataset.from_list(train), Dataset.from_list(validation)


def collator(config: DistillConfig, sides: Sides, split: str, data: Dataset) -> Collator:
    """What makes batches of one split, "train" or "validation"; its samples are checked against the teachers' caches."""
    caches = _caches(config, sides, split, data)
    return Collator(sides.student, sides.tokenizers, sides.exact_only, config.data.max_tokens, caches)


def load_teacher(config: DistillConfig, sides: Sides, i: int) -> Teacher:
    """Teacher i: its cache if it has one, else its model, which gives hidden states where the loss takes them."""
    given, size = config.teachers[i], sides.loss.teachers[i].vocab_size
    if given.cache is not None:
        return CachedTeacher(size, read_index(Path(given.cache) / "train").teacher, sides.projections[i])
    model, _ = load_causal_lm(given.model)
    whole = given.full_logits or needs_logits(sides.loss, i) or size <= sides.loss.vocab_topk
    return LiveTeacher(model, size, given.model, sides.projections[i], given.offload, None if whole else _head(model, i))


def write_caches(config: DistillConfig, progress: Progress) -> list[dict]:
    """Write the cache of every teacher that has a model and a cache folder; {folder, samples, bytes} of each.

    Training and validation samples lie in the folders train and validation below it. Raises ChassisError when no teacher
    names both.
    """
    config.check()
    train, validation = datasets(config, load_tokenizer(config.student))
    splits = {"train": train, "validation": validation}
    chosen = [t for t in config.teachers if t.model is not None and t.cache is not None]
    if not chosen:
        raise ChassisError("no teacher has both a model and a cache: nothing to write")
    found = []
    for teacher in chosen:
        model, tokenizer = load_causal_lm(teacher.model, device=config.training.device)
        for split, data in splits.items():
            if data is None:
                continue
            index = write_cache(
                Path(teacher.cache) / split,
                model,
                tokenizer,
                data["text"],
                name=teacher.model,
                max_tokens=config.data.max_tokens,
                top_k=config.cache.top_k,
                samples_per_shard=config.cache.samples_per_shard,
                progress=lambda done, total, what=f"{teacher.cache} {split}": progress(what, done, total),
            )
            found.append({"folder": f"{teacher.cache}/{split}", "samples": index.samples, "bytes": index.n_bytes})
    return found


def _tokenizer(teacher: TeacherOptions):
    if teacher.cache is None:
        return load_tokenizer(teacher.model)
    return Cache(Path(teacher.cache) / "train").tokenizer()


def _projection(spec: str, student, teacher, gold: bool, texts: Iterable[str]) -> SparseProjection:
    if spec == "tokenizers" or (spec == "auto" and gold):
        return build_projection(student, teacher)
    if spec in BUILT:
        return counted_projection(student, teacher, texts)
    hashes = vocabulary_hash(student), vocabulary_hash(teacher)
    found = load_projection(spec, len(student), len(teacher), hashes=hashes, gold=gold)
    for notice in found.notices:
        warnings.warn(f"{spec}: {notice}", stacklevel=2)
    return found.projection


def _caches(config: DistillConfig, sides: Sides, split: str, data: Dataset) -> dict[int, Cache]:
    """The caches of one split, each checked against its samples, its tokenizer and the model that the teacher names."""
    found = {}
    for i, teacher in enumerate(config.teachers):
        if teacher.cache is None:
            continue
        found[i] = cache = Cache(Path(teacher.cache) / split)
        cache.check_samples(data["text"])
        cache.check_tokenizer(sides.tokenizers[i] or sides.student)
        if teacher.model not in (None, cache.index.teacher):
            raise ChassisError(
                f"{cache.folder} is the cache of {cache.index.teacher}, but teachers.{i}.model is {teacher.model}: give "
                "another cache, or write it again, or leave the model out"
            )
    return found


def _head(model, i: int) -> Head:
    try:
        return inspect_head(model)
    except ModelError as error:
        raise ChassisError(f"teachers.{i}: {error}; teachers.{i}.full_logits=true takes its logits as they are") from error
