"""Distillation on the testbed, beside the same number of steps on cross-entropy alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from chassis.distill.config import Data, DistillConfig, Loss, Teacher, Training
from chassis.distill.inputs import Progress
from chassis.distill.run import distill
from chassis.testbed import Testbed


def demo_config(testbed: Testbed, out: str | Path, steps: int = 60, seed: int = 0) -> DistillConfig:
    """The base learns from the other expert (another tokenizer, architecture and width) and from its own expert."""
    return DistillConfig(
        student=str(testbed.base),
        out=str(out),
        teachers=[Teacher(model=str(testbed.other_expert)), Teacher(model=str(testbed.expert))],
        data=Data(
            train=[str(testbed.data / "source_fit.jsonl")],
            validation=[str(testbed.data / "source_validation.jsonl")],
            pack_length=768,
            max_tokens=256,
            max_validation_samples=64,
        ),
        training=Training(
            steps=steps,
            batch_size=16,
            micro_batch_size=16,
            learning_rate=1e-3,
            warmup_steps=max(steps // 10, 1),
            evaluate_every=max(steps // 3, 1),
            save_every=steps,
            seed=seed,
        ),
    )


def cross_entropy_only(config: DistillConfig, out: str | Path) -> DistillConfig:
    """The same steps on the same text without a teacher's say; the teachers are still measured."""
    return replace(config, out=str(out), loss=Loss(dynamic_loss_scaling=False, kl_loss_weight=0.0, ce_loss_scale=1.0))


def run_demo(testbed: Testbed, out: str | Path, steps: int = 60, progress: Progress = lambda *_: None) -> dict:
    """Both runs; the results of the distilled student with the other's bits per byte under `compared`."""
    config = demo_config(testbed, Path(out), steps)
    results = distill(config, progress)
    alone = cross_entropy_only(config, Path(out) / "cross-entropy")
    plain = distill(alone, lambda stage, done, total: progress("cross-entropy alone", done, total))
    bits = [(entry["step"], entry["eval_bits_per_byte"]) for entry in plain["history"] if "eval_bits_per_byte" in entry]
    return results | {"compared": {"cross-entropy alone": bits}}
