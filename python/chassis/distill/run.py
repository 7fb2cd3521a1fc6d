"""`chassis distill`, from a configuration to a trained student."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from chassis.bridge.projection import build_projection, counted_projection
from chassis.bridge.projection_file import load_projection
from chassis.distill.cache import Cache, write_cache
from chassis.distill.collator import Collator
from chassis.distill.config import DistillConfig
from chassis.distill.config import Teacher as TeacherOptions
from chassis.distill.packing import pack
from chassis.distill.teachers import CachedTeacher, LiveTeacher, Teacher
from chassis.distill.trainer import DistillTrainer
from chassis.errors import ChassisError, ModelError
from chassis.files import ensure_writable, write_file
from chassis.models import Head, inspect_head, load_causal_lm, load_tokenizer, vocabulary_hash
from chassis.results import environment
from chassis.text.corpus import load_documents
from chassis_kernels import SparseProjection, XTokenConfig
from chassis_kernels.xtoken_loss import needs_logits

Progress = Callable[[str, int, int], None]  # stage, done, total
CONFIG = "config.json"
# Its name before and from transformers 5.20 or so on; the old one warns where the new one is known.
_NEW, _OLD = "activation_checkpointing", "gradient_checkpointing"
_CHECKPOINTING = _NEW if _NEW in TrainingArguments.__dataclass_fields__ else _OLD
BUILT = ("auto", "counted", "tokenizers")


class ShowProgress(TrainerCallback):
    """Tells how many optimizer steps are done."""

    def __init__(self, report: Progress) -> None:
        self.report = report

    def on_train_begin(self, args, state, control, **kwargs):
        self.report("distill", state.global_step, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self.report("distill", state.global_step, state.max_steps)


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


def distill(config: DistillConfig, progress: Progress = lambda stage, done, total: None) -> dict:
    """Train the student; returns what `chassis.distill.report` draws. `config.out` gets the checkpoints and the student.

    The same call goes on from the newest checkpoint in `config.out`. Raises ChassisError for everything that can be known
    to be wrong before a model is loaded, and for an output folder that holds another run.
    """
    started = time.perf_counter()
    config.check(int(os.environ.get("WORLD_SIZE", 1)))
    out = ensure_writable(config.out)
    _same_run(config, out)
    student_tokenizer = load_tokenizer(config.student)
    train, validation = datasets(config, student_tokenizer)
    sides = load_sides(config, student_tokenizer, train["text"])
    teachers = [load_teacher(config, sides, i) for i in range(len(config.teachers))]
    student, _ = load_causal_lm(config.student, dtype=torch.float32)  # what AdamW updates, whatever the precision
    checkpoint = _newest_checkpoint(out)
    arguments = training_arguments(config, resumed=checkpoint is not None)
    set_seed(config.training.seed)

    def collator(split: str, data: Dataset) -> Collator:
        caches = _caches(config, split, data)
        return Collator(sides.student, sides.tokenizers, sides.exact_only, config.data.max_tokens, caches)

    trainer = DistillTrainer(
        student.train(),
        arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collator("train", train),
        eval_collator=None if validation is None else collator("validation", validation),
        processing_class=sides.student,
        loss_config=sides.loss,
        teachers=teachers,
        warmup_start=config.training.warmup_start,
        head=inspect_head(student) if config.training.fused_head else None,
        callbacks=[ShowProgress(progress)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model(str(out / "student"))
    history = trainer.state.log_history
    results = {"student": _short(config.student), "teachers": [_short(t.name) for t in teachers], "history": history}
    results |= {"samples": len(train), "validation_samples": len(validation or ()), "steps": trainer.state.global_step}
    results |= {"seconds": time.perf_counter() - started, "config": dataclasses.asdict(config), "environment": environment()}
    return results


def _short(name: str) -> str:
    """The last part of a folder's path; a hub name as it is."""
    return Path(name).name if Path(name).is_dir() else name


def is_main_process() -> bool:
    """Whether this process prints and writes: the first of a torchrun, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


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


def training_arguments(config: DistillConfig, resumed: bool = False) -> TrainingArguments:
    """The same options as transformers.Trainer names them."""
    training, out = config.training, Path(config.out)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    on_cpu = training.device == "cpu"
    return TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=training.steps,
        per_device_train_batch_size=training.micro_batch_size,
        per_device_eval_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=training.batch_size // (ranks * training.micro_batch_size),
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        adam_beta1=training.betas[0],
        adam_beta2=training.betas[1],
        max_grad_norm=training.max_grad_norm,
        warmup_steps=training.warmup_steps,
        bf16=training.precision == "bfloat16",
        eval_strategy="steps" if config.data.validation else "no",
        eval_steps=training.evaluate_every,
        eval_on_start=bool(config.data.validation) and not resumed,
        save_steps=training.save_every,
        save_total_limit=2,
        logging_steps=training.log_every,
        report_to=["tensorboard"],
        dataloader_drop_last=True,
        dataloader_num_workers=training.workers,
        remove_unused_columns=False,
        restore_callback_states_from_checkpoint=True,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and ranks > 1 else None,
        ddp_find_unused_parameters=False,
        fsdp=training.fsdp or None,
        fsdp_config={"version": 2, "activation_checkpointing": training.activation_checkpointing} if training.fsdp else None,
        seed=training.seed,
        disable_tqdm=True,
        **{_CHECKPOINTING: training.activation_checkpointing and not training.fsdp},
    )


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


def _caches(config: DistillConfig, split: str, data: Dataset | None) -> dict[int, Cache]:
    """The caches of one split, each checked against its samples."""
    found = {}
    for i, teacher in enumerate(config.teachers):
        if teacher.cache is not None and data is not None:
            found[i] = Cache(Path(teacher.cache) / split)
            found[i].check_samples(data["text"])
    return found


def load_teacher(config: DistillConfig, sides: Sides, i: int) -> Teacher:
    """Teacher i: its cache if it has one, else its model, which gives hidden states where the loss takes them."""
    given, size = config.teachers[i], sides.loss.teachers[i].vocab_size
    if given.cache is not None:
        return CachedTeacher(size, given.cache, sides.projections[i])
    model, _ = load_causal_lm(given.model)
    whole = given.full_logits or needs_logits(sides.loss, i) or size <= sides.loss.vocab_topk
    return LiveTeacher(model, size, given.model, sides.projections[i], given.offload, None if whole else _head(model, i))


def _head(model, i: int) -> Head:
    try:
        return inspect_head(model)
    except ModelError as error:
        raise ChassisError(f"teachers.{i}: {error}; teachers.{i}.full_logits=true takes its logits as they are") from error


def _same_run(config: DistillConfig, out: Path) -> None:
    """Keep the configuration beside the checkpoints; ChassisError if those were made with another one."""
    text = json.dumps(dataclasses.asdict(config), sort_keys=True)
    path = out / CONFIG
    if path.exists() and _newest_checkpoint(out):
        theirs = json.loads(path.read_text())
        changed = [
            key for key in ("student", "teachers", "data", "loss", "training") if theirs.get(key) != json.loads(text)[key]
        ]
        if changed:
            raise ChassisError(
                f"{out} holds checkpoints of a run with other {', '.join(changed)}: give another out, or remove the folder"
            )
    if is_main_process():
        write_file(path, text)


def _newest_checkpoint(out: Path) -> Path | None:
    """The newest that was written to its end, wherever a process was killed: trainer_state.json comes last."""
    found = {int(path.name.rsplit("-")[-1]): path for path in (out / "checkpoints").glob("checkpoint-*")}
    return next((found[step] for step in sorted(found, reverse=True) if _is_whole(found[step])), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text()))
    except (OSError, ValueError):
        return False
