"""`chassis distill`, from a configuration to a trained student."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from chassis.distill.config import DistillConfig
from chassis.distill.inputs import Progress, collator, datasets, load_sides, load_teacher
from chassis.distill.trainer import DistillTrainer
from chassis.errors import ChassisError
from chassis.files import ensure_config_is, write_file
from chassis.models import inspect_head, load_causal_lm, load_tokenizer
from chassis.results import environment

CONFIG, RESULTS = "config.json", "results.json"
# Its name before and from transformers 5.20 or so on; the old one warns where the new one is known.
_NEW, _OLD = "activation_checkpointing", "gradient_checkpointing"
_CHECKPOINTING = _NEW if _NEW in TrainingArguments.__dataclass_fields__ else _OLD


class ShowProgress(TrainerCallback):
    """Tells how many optimizer steps are done."""

    def __init__(self, report: Progress) -> None:
        self.report = report

    def on_train_begin(self, args, state, control, **kwargs):
        self.report("distill", state.global_step, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self.report("distill", state.global_step, state.max_steps)


def distill(config: DistillConfig, progress: Progress = lambda stage, done, total: None) -> dict:
    """Train the student; returns what `chassis.distill.report` draws. `config.out` gets the checkpoints and the student.

    The same call goes on from the newest checkpoint in `config.out`, and gives the same back when all is done. Raises
    ChassisError for everything that can be known to be wrong before a model is loaded, and for an output folder that holds
    another run or a model.
    """
    started = time.perf_counter()
    config.check(int(os.environ.get("WORLD_SIZE", 1)))
    out = ensure_config_is(config.out, "student")
    _same_run(config, out)
    if (done := _finished(out)) is not None:
        return done
    student_tokenizer = load_tokenizer(config.student)
    train, validation = datasets(config, student_tokenizer)
    sides = load_sides(config, student_tokenizer, train["text"])
    training = collator(config, sides, "train", train)
    measuring = None if validation is None else collator(config, sides, "validation", validation)
    teachers = [load_teacher(config, sides, i) for i in range(len(config.teachers))]
    student, _ = load_causal_lm(config.student, dtype=torch.float32)  # what AdamW updates, whatever the precision
    student.config.pad_token_id = student.generation_config.pad_token_id = sides.student.pad_token_id
    checkpoint = _newest_checkpoint(out, before=config.training.steps)
    arguments = training_arguments(config, resumed=checkpoint is not None)
    set_seed(config.training.seed)

    trainer = DistillTrainer(
        student.train(),
        arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=training,
        eval_collator=measuring,
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


def _finished(out: Path) -> dict | None:
    """What `chassis.distill.report` kept of a run that ended: going on would take transformers a step past the last."""
    try:
        results = json.loads((out / RESULTS).read_text())
    except (OSError, ValueError):
        return None
    return results if _newest_checkpoint(out) and (out / "student").exists() else None


def _newest_checkpoint(out: Path, before: float = math.inf) -> Path | None:
    """The newest that was written to its end, wherever a process was killed: trainer_state.json comes last."""
    found = {int(path.name.rsplit("-")[-1]): path for path in (out / "checkpoints").glob("checkpoint-*")}
    found = {step: path for step, path in found.items() if step < before}
    return next((found[step] for step in sorted(found, reverse=True) if _is_whole(found[step])), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text()))
    except (OSError, ValueError):
        return False
