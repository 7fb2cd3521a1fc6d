"""A distilled student: its losses do not depend on how a batch is cut, what is kept, or where the run was stopped."""

import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chassis.distill.config import Loss
from chassis.distill.fused_head import without_logits
from chassis.distill.report import write_report
from chassis.distill.run import distill
from chassis.errors import ChassisError
from chassis.models import load_causal_lm
from omegaconf import OmegaConf
from safetensors.torch import load_file
from support import LiveMemory, logged


@pytest.mark.parametrize("loss", [Loss(), Loss(gold_loss=True), Loss(temperature=2.0)], ids=["p-kl", "gold", "tempered"])
def test_losses_do_not_depend_on_the_micro_batch_or_who_makes_it(distilling, loss, tmp_path):
    distilling.loss = loss
    whole = distill(distilling)
    cut = replace(distilling.training, micro_batch_size=1, workers=1)
    parts = distill(replace(distilling, out=str(tmp_path / "parts"), training=cut))
    for name in ("kl_loss", "ce_loss", "kl_loss_t0", "loss", "grad_norm", "kl_loss_scale"):
        assert logged(parts, name)[0] == pytest.approx(logged(whole, name)[0], rel=1e-5), name
        assert logged(parts, name) == pytest.approx(logged(whole, name), rel=1e-4), name  # the updates amplify rounding
    for name in ("eval_bits_per_byte", "eval_kl_loss_t0", "eval_kl_loss_t1", "eval_accuracy"):
        assert logged(parts, name) == pytest.approx(logged(whole, name), rel=1e-4), name
    assert len(logged(whole, "eval_bits_per_byte")) == 2  # the no-op and the end


@pytest.mark.parametrize("loss", [Loss(kd_loss_mode="select_teacher"), Loss(sum_weights_metric="max_prob")], ids=str)
def test_every_mode_trains_and_is_logged(distilling, loss):
    distilling.loss = loss
    results = distill(distilling)
    if loss.kd_loss_mode == "select_teacher":
        shares = [sum(pair) for pair in zip(logged(results, "selected_t0"), logged(results, "selected_t1"), strict=True)]
        assert shares == [1.0] * 3
    else:
        weights = zip(logged(results, "weight_t0"), logged(results, "weight_t1"), strict=True)
        assert [sum(pair) for pair in weights] == pytest.approx([1.0] * 3)
    assert all(torch.tensor(logged(results, "loss")).isfinite())


BFLOAT16, CHECKPOINTING = {"precision": "bfloat16"}, {"activation_checkpointing": True}


@pytest.mark.parametrize("options,tolerance", [(BFLOAT16, 2e-3), (CHECKPOINTING, 1e-6)], ids=str)
def test_losses_hardly_depend_on_precision_and_not_on_checkpointing(distilling, options, tolerance, tmp_path):
    other = replace(distilling, out=str(tmp_path / "other"), training=replace(distilling.training, **options))
    calls = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: calls.append(module))
    try:
        plain, n_plain = distill(distilling), len(calls)
        other, n_other = distill(other), len(calls) - n_plain
    finally:
        hook.remove()
    assert (n_other > n_plain) == (options is CHECKPOINTING)  # blocks run again in the backward pass
    assert (logged(other, "loss") == logged(plain, "loss")) == (options is CHECKPOINTING)
    for name in ("loss", "ce_loss", "kl_loss_t0", "kl_loss_t1", "grad_norm", "eval_bits_per_byte", "eval_kl_loss_t0"):
        assert logged(other, name) == pytest.approx(logged(plain, name), rel=tolerance), name


@pytest.mark.parametrize("loss", [Loss(), Loss(reverse_kl=True, temperature=2.0, vocab_topk=64)], ids=["plain", "reverse"])
def test_the_loss_of_hidden_states_is_that_of_logits(distilling, loss, tmp_path):
    distilling.teachers, distilling.loss = [replace(distilling.teachers[0], weight=0.5)], loss
    distilling.training.micro_batch_size = 2  # each chooses its own columns
    logits = distill(distilling)
    training = replace(distilling.training, fused_head=True)
    hidden = distill(replace(distilling, out=str(tmp_path / "hidden"), training=training))
    assert {*logits["history"][1]} == {*hidden["history"][1]}
    names = ("loss", "kl_loss", "ce_loss", "kl_loss_scale", "accuracy", "kl_loss_t0", "grad_norm", "num_valid_pairs_t0")
    for name in (*names, "eval_bits_per_byte", "eval_kl_loss_t0", "eval_accuracy"):
        assert logged(hidden, name) == pytest.approx(logged(logits, name), rel=1e-4), name


def test_no_logits_of_the_student_are_made(distilling):
    model, _ = load_causal_lm(distilling.student)
    ids = torch.arange(48)[None]
    with LiveMemory() as memory, without_logits(model.get_output_embeddings()) as hidden:
        model(input_ids=ids)
    width = model.get_output_embeddings().weight.shape[0]
    assert hidden[0].shape[:2] == ids.shape and not any(width in shape[-1:] for shape in memory.shapes)
    assert model(input_ids=ids).logits.shape[-1] == width


@pytest.mark.parametrize("options", [{}, BFLOAT16, CHECKPOINTING], ids=str)
def test_a_run_stopped_anywhere_goes_on_with_the_same_losses(distilling, options, tmp_path):
    distilling.training = replace(distilling.training, steps=5, save_every=2, **options)
    whole = distill(distilling)

    class Stop(Exception):
        pass

    def stop(stage, done, total):
        if done == 3:
            raise Stop

    again = replace(distilling, out=str(tmp_path / "again"))
    with pytest.raises(Stop):
        distill(again, stop)
    resumed = distill(again)
    for name in ("loss", "kl_loss", "kl_loss_scale", "grad_norm", "learning_rate"):
        assert logged(resumed, name)[-3:] == logged(whole, name)[-3:], name
    with pytest.raises(ChassisError, match="holds checkpoints of a run with other training"):
        distill(replace(again, training=replace(distilling.training, learning_rate=1e-4)))
    student = [load_file(tmp_path / name / "student/model.safetensors") for name in ("out", "again")]
    assert all(torch.equal(student[0][k], student[1][k]) for k in student[0])


def test_a_run_killed_at_any_moment_goes_on_with_the_same_losses(distilling, tmp_path):
    """Also while it writes a checkpoint: it writes one after every step."""
    distilling.training = replace(distilling.training, steps=20, save_every=1, evaluate_every=20)
    whole = distill(distilling)
    again = replace(distilling, out=str(tmp_path / "again"))
    OmegaConf.save(OmegaConf.structured(again), tmp_path / "again.yaml")
    command = [sys.executable, "-c", "from chassis.cli import main; main()", "distill", "--config", tmp_path / "again.yaml"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (tmp_path / "again/checkpoints/checkpoint-1").exists():
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))
        process.kill()
    assert process.returncode == -signal.SIGKILL, "it was done before"
    resumed = distill(again)
    for name in ("loss", "kl_loss_scale", "learning_rate", "eval_bits_per_byte"):
        assert logged(resumed, name) == pytest.approx(logged(whole, name), rel=1e-5), name


def test_an_unfinished_checkpoint_is_passed_over(distilling):
    distilling.training = replace(distilling.training, save_every=2)
    whole = distill(distilling)
    state = Path(distilling.out, "checkpoints/checkpoint-3/trainer_state.json")
    state.write_text(state.read_text()[:100])
    assert logged(distill(distilling), "loss") == logged(whole, "loss")


def test_a_run_that_ended_takes_no_further_step(distilling):
    whole = distill(distilling)
    student = Path(distilling.out, "student/model.safetensors")
    weights = load_file(student)
    for kept in (False, True):  # without and with the results beside the checkpoints
        if kept:
            write_report(whole, distilling.out)
        again = distill(distilling)
        assert again["steps"] == whole["steps"] == 3 and logged(again, "loss") == logged(whole, "loss")
        assert all(torch.equal(weights[name], tensor) for name, tensor in load_file(student).items())


def test_too_little_text_and_other_vocabularies_are_refused(distilling, tiny_testbed):
    distilling.training = replace(distilling.training, batch_size=400)
    with pytest.raises(ChassisError, match="training.batch_size is 400"):
        distill(distilling)
    distilling.training = replace(distilling.training, batch_size=4)
    distilling.teachers[0].projection = None
    with pytest.raises(ChassisError, match="have different vocabularies"):
        distill(distilling)
