"""Distillation on the testbed against its bars: what the loss adds to a student's step, and what the teachers are worth.

    python benchmarks/testbed_distill.py step             a step with xtoken_loss beside the same step with cross-entropy
    python benchmarks/testbed_distill.py seeds 0 1 2      the demo beside as many steps on cross-entropy alone

A step is forward, loss, backward and AdamW on the demo's batches; the teachers' distributions are there before it starts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from chassis.distill.cache import top_k_of
from chassis.distill.collator import Collator
from chassis.distill.config import DistillConfig
from chassis.distill.demo import cross_entropy_only, demo_config
from chassis.distill.fused_head import fused_loss, without_logits
from chassis.distill.inputs import datasets, load_sides, load_teacher
from chassis.distill.report import curves
from chassis.distill.run import distill
from chassis.distill.teachers import batches
from chassis.models import inspect_head, load_causal_lm, load_tokenizer
from chassis.page import Row, Table, print_tables
from chassis.testbed import build
from rich.console import Console

from chassis_kernels import xtoken_loss
from chassis_kernels.teacher import TopK

STEP_BAR, KL_BAR = 1.15, 0.6


def step_table(config: DistillConfig, n_batches: int, rounds: int) -> Table:
    """Medians over interleaved steps: seconds of processor time, and times the step with cross-entropy."""
    size, top_k = config.training.batch_size, config.cache.top_k
    tokenizer = load_tokenizer(config.student)
    samples, _ = datasets(config, tokenizer)
    sides = load_sides(config, tokenizer, samples["text"])
    teachers = [load_teacher(config, sides, i) for i in range(len(config.teachers))]
    collator = Collator(tokenizer, sides.tokenizers, sides.exact_only, config.data.max_tokens)
    student, _ = load_causal_lm(config.student, dtype=torch.float32)
    head = inspect_head(student)
    optimizer = torch.optim.AdamW(student.train().parameters(), lr=1e-5)
    options = {"dynamic_loss_scaling": False, "ce_loss_scale": 1.0}
    loss_of = {n: replace(sides.loss, teachers=sides.loss.teachers[:n], **options) for n in (1, len(teachers))}

    def run(loss: Callable, inputs: dict, found: Sequence) -> float:
        started = time.process_time()
        loss(inputs, found).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - started

    def cross_entropy(inputs, _):
        mask = inputs["attention_mask"]
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        return student(input_ids=inputs["input_ids"], attention_mask=mask, labels=labels, use_cache=False).loss

    def ours(inputs, found):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        logits = student(input_ids=ids, attention_mask=mask, use_cache=False).logits
        rest = {"input_ids": ids, "token_mask": mask, "sample_mask": inputs["sample_mask"]}
        return xtoken_loss(logits, found, loss_of[len(found)], **rest)[0]

    def hidden_states(inputs, found):
        ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with without_logits(head.unembedding) as hidden:
            student(**ids, use_cache=False)
        n_tokens, n_chunks = inputs["counts"][:2]
        teacher = found[0]._replace(global_valid_chunks=n_chunks)
        return fused_loss(head, *hidden, teacher, loss_of[1], inputs, n_tokens)[0]

    seconds: dict[str, list[float]] = {}
    for start in range(0, n_batches * size, size):
        inputs = collator([samples[i] for i in range(start, start + size)])
        with batches(teachers, inputs) as found:
            cached = found[0]._replace(logits=TopK(*top_k_of(found[0].logits, top_k)))
            cases = {
                "cross-entropy": (cross_entropy, ()),
                f"one teacher, cached top {top_k}": (ours, [cached]),
                "one teacher, live": (ours, found[:1]),
                "one teacher, live, fused_head": (hidden_states, found[:1]),
                "both teachers, live": (ours, found),
            }
            for _ in range(rounds):
                for name, (loss, given) in cases.items():
                    seconds.setdefault(name, []).append(run(loss, inputs, given))
    plain = seconds["cross-entropy"]
    rows = []
    for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, plain, strict=True))
        rows.append(Row([name, f"{statistics.median(own):.3f}", f"{ratio:.3f}"]))
    return Table(f"The student's step (bar: {STEP_BAR} with one teacher)", ["loss", "seconds", "× cross-entropy"], rows)


def seeds_table(config: DistillConfig, seeds: Sequence[int]) -> Table:
    """Held-out numbers of each seed: distilled, and the same steps on cross-entropy alone."""
    rows = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            seeded = replace(config, out=f"{folder}/kd", training=replace(config.training, seed=seed))
            results = [distill(seeded), distill(cross_entropy_only(seeded, f"{folder}/ce"))]
        bits = [curves(found["history"], "eval_bits_per_byte")[1] for found in results]
        kl = [curves(results[0]["history"], f"eval_kl_loss_t{i}")[1] for i in range(len(config.teachers))]
        total = [sum(values) for values in zip(*kl, strict=True)]
        share = total[-1] / total[0]
        cells = [f"{bits[0][0]:.3f}", f"{bits[0][-1]:.3f}", f"{bits[1][-1]:.3f}"]
        cells += [f"{values[0]:.3f} → {values[-1]:.3f}" for values in kl] + [f"{share:.1%}"]
        met = bits[0][-1] < bits[1][-1] and share <= KL_BAR
        rows.append(Row([str(seed), *cells, "yes" if met else "no"]))
    names = [f"KL to {Path(teacher.model).name}" for teacher in config.teachers]
    columns = ["seed", "bits per byte before", "distilled", "cross-entropy alone", *names, "KL left", "bars met"]
    return Table(f"The demo, {config.training.steps} steps (bars: fewer bits; KL at most {KL_BAR:.0%})", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    step = commands.add_parser("step")
    step.add_argument("--batches", type=int, default=6)
    step.add_argument("--rounds", type=int, default=5)
    seeds = commands.add_parser("seeds")
    seeds.add_argument("seeds", type=int, nargs="+")
    seeds.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    config = demo_config(build(), "out", getattr(arguments, "steps", 60))
    if arguments.command == "step":
        table = step_table(config, arguments.batches, arguments.rounds)
    else:
        table = seeds_table(config, arguments.seeds)
    print_tables([table], Console(width=140))


if __name__ == "__main__":
    main()
