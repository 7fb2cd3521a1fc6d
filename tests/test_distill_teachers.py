"""What a teacher gives to the loss: logits, hidden states, or a cache; and that it is let go."""

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
from chassis.distill.collator import Collator
from chassis.distill.config import Loss, Teacher
from chassis.distill.inputs import datasets, load_sides, load_teacher, write_caches
from chassis.distill.run import distill
from chassis.distill.teachers import LiveTeacher, batches
from chassis.errors import ChassisError, ModelError
from chassis.models import inspect_head, load_tokenizer
from support import LiveMemory, logged

from chassis_kernels.reference.teacher import logits as teacher_logits
from chassis_kernels.teacher import TeacherHead


def test_a_cached_teacher_gives_what_the_live_one_gives(distilling, tiny_testbed, tmp_path):
    size = len(load_tokenizer(tiny_testbed.other_expert))
    distilling.teachers = [Teacher(model=str(tiny_testbed.other_expert))]
    live = distill(distilling)
    distilling.teachers[0].cache = str(tmp_path / "cache")
    distilling.cache.top_k = size
    with pytest.raises(ChassisError, match="no teacher cache"):
        distill(replace(distilling, out=str(tmp_path / "early")))
    written = write_caches(distilling, lambda *_: None)
    assert [c["samples"] for c in written] == [len(d) for d in datasets(distilling, load_tokenizer(distilling.student))]
    distilling.teachers[0].model = str(tiny_testbed.expert)
    with pytest.raises(ChassisError, match=r"cache/train is the cache of .*other_expert, but .*model is .*/expert"):
        distill(replace(distilling, out=str(tmp_path / "other")))
    distilling.teachers[0].model = None
    index = tmp_path / "cache/train/index.json"
    good = index.read_text()
    index.write_text(good.replace(json.loads(good)["vocabulary_hash"], "0"))
    with pytest.raises(ChassisError, match="cache/train was made for another tokenizer, that of .*other_expert"):
        distill(replace(distilling, out=str(tmp_path / "other")))
    index.write_text(good)
    cached = distill(replace(distilling, out=str(tmp_path / "cached")))
    for name in ("kl_loss", "ce_loss", "eval_kl_loss_t0"):
        assert logged(cached, name) == pytest.approx(logged(live, name), rel=0.02), name  # float16 on disk


def test_hidden_states_give_what_the_logits_give(distilling, tmp_path):
    distilling.loss = Loss(vocab_topk=64)
    hidden = distill(distilling)
    for teacher in distilling.teachers:
        teacher.full_logits = True
    logits = distill(replace(distilling, out=str(tmp_path / "logits")))
    for name in ("loss", "kl_loss_t0", "kl_loss_t1", "grad_norm", "eval_kl_loss_t0", "eval_kl_loss_t1"):
        assert logged(hidden, name) == pytest.approx(logged(logits, name), rel=1e-5), name


@pytest.mark.parametrize(
    "options,form",
    [({"vocab_topk": 64}, TeacherHead), ({}, torch.Tensor), ({"vocab_topk": 64, "sum_weights_metric": "ce"}, torch.Tensor)],
    ids=["few columns", "all columns", "scored teachers"],
)
def test_a_teacher_gives_logits_only_where_the_loss_reads_them_all(distilling, options, form):
    distilling.loss = Loss(**options)
    student = load_tokenizer(distilling.student)
    sides = load_sides(distilling, student, ["def f(x):"])
    teachers = [load_teacher(distilling, sides, i) for i in range(2)]
    inputs = Collator(student, sides.tokenizers, sides.exact_only, 64)([{"text": "import os\n" * 9, "index": 0}])
    with LiveMemory() as memory, batches(teachers, inputs) as found:
        assert all(isinstance(teacher.logits, form) for teacher in found)
        sizes = {teacher.vocab_size for teacher in sides.loss.teachers}
        assert any(shape[:1] == (1,) and shape[-1] in sizes for shape in memory.shapes) == (form is torch.Tensor)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere"])  # plain, softcap, scale
def test_a_teacher_s_hidden_states_make_its_logits(tiny_lm, architecture):
    model = tiny_lm(architecture)
    inputs = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    given = [LiveTeacher(model, 300, "t", head=head).batch(inputs, {}).logits for head in (None, inspect_head(model))]
    torch.testing.assert_close(teacher_logits(given[1], 300), given[0])


def test_a_head_of_another_kind_is_refused_or_taken_as_logits(distilling, monkeypatch):
    distilling.loss = Loss(vocab_topk=64)
    sides = load_sides(distilling, load_tokenizer(distilling.student), ["def f(x):"])

    def refuse(model):
        raise ModelError("its logits are not softcap(scale * (h Wᵀ + b))")

    monkeypatch.setattr("chassis.distill.inputs.inspect_head", refuse)
    with pytest.raises(ChassisError, match=r"teachers\.0: its logits are not .*teachers\.0\.full_logits=true"):
        load_teacher(distilling, sides, 0)
    distilling.teachers[0].full_logits = True
    assert load_teacher(distilling, sides, 0).head is None


def test_teachers_are_released_when_the_student_fails():
    kept = []

    class Big:
        projection = None

        def batch(self, inputs, own):
            logits = torch.zeros(3)
            kept.append(weakref.ref(logits))
            return logits

    with pytest.raises(RuntimeError, match="student"):
        with batches([Big(), Big()], {"teachers": [{}, {}]}):
            raise RuntimeError("student")
    gc.collect()
    assert len(kept) == 2 and all(ref() is None for ref in kept)
