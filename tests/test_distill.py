"""Distillation: configuration, packing, batches, caches, and a trainer whose losses do not depend on how a batch is cut."""

import gc
import json
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chassis.distill.cache import Cache, read_index, write_cache
from chassis.distill.collator import Collator
from chassis.distill.config import Data, DistillConfig, Loss, Teacher, Training, load_config
from chassis.distill.packing import pack
from chassis.distill.run import datasets, distill, load_sides, load_teacher, write_caches
from chassis.distill.teachers import LiveTeacher, batches
from chassis.errors import ChassisError, ModelError
from chassis.models import inspect_head, load_causal_lm, load_tokenizer
from chassis.text.alignment import align
from chassis.text.corpus import Document
from chassis.text.spans import text_spans
from safetensors.torch import load_file
from support import LiveMemory

from chassis_kernels.chunks import layout
from chassis_kernels.reference.teacher import logits as teacher_logits
from chassis_kernels.teacher import TeacherHead

MINIMAL = "student: a\nout: o\ndata: {train: [x]}\nteachers: [{model: m}]\n"


@pytest.fixture(scope="module")
def work(tiny_testbed, tmp_path_factory):
    """A folder with some short documents to train on and to measure on."""
    folder = tmp_path_factory.mktemp("distill")
    for split in ("fit", "validation"):
        texts = [
            d.text[start : start + 300] for d in tiny_testbed.documents["source"][split][:4] for start in range(0, 1500, 300)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


@pytest.fixture
def config(tiny_testbed, work, tmp_path):
    return DistillConfig(
        student=str(tiny_testbed.base),
        out=str(tmp_path / "out"),
        teachers=[Teacher(model=str(tiny_testbed.other_expert)), Teacher(model=str(tiny_testbed.expert), weight=0.5)],
        data=Data(
            train=[str(work / "fit.jsonl")], validation=[str(work / "validation.jsonl")], pack_length=300, max_tokens=64
        ),
        training=Training(
            steps=3, batch_size=4, micro_batch_size=4, learning_rate=1e-3, warmup_steps=1, evaluate_every=3, save_every=100
        ),
    )


def logged(results, name):
    return [entry[name] for entry in results["history"] if name in entry]


# -- configuration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,overrides,message",
    [
        (MINIMAL + "trainig: {}\n", [], "Did you mean: 'training'"),
        (MINIMAL, ["training.stepz=4"], "training.stepz.*Did you mean: 'steps'"),
        (MINIMAL, ["training.steps=abc"], "training.steps: Value 'abc'"),
        ("student: a\n", [], "missing mandatory value: out"),
        (": : :", [], "not YAML"),
        ("- 1\n", [], "expected keys and values"),
        (MINIMAL, ["steps"], "expected key=value"),
        (MINIMAL, ["teachers.3.weight=1"], r"teachers\[3\]"),
        (MINIMAL, ["loss.xtoken_loss=true"], "needs gold_loss=True"),
        (MINIMAL, ["teachers.0.xtoken_loss=true"], "set gold_loss too"),
        (MINIMAL, ["loss.kd_loss_mode=averaged"], "expected one of sum, averaged_logits, select_teacher"),
        (MINIMAL, ["loss.kd_loss_mode=select_teacher", "loss.sum_weights_metric=ce"], "needs kd_loss_mode='sum'"),
        (MINIMAL, ["loss.kd_loss_mode=averaged_logits", "teachers.0.weight=0"], "weights sum to 0"),
        (MINIMAL, ["training.batch_size=63", "training.micro_batch_size=2"], "expected a multiple of 2"),
        (MINIMAL, ["training.precision=int8"], "training.precision is 'int8'"),
        (MINIMAL, ["data.pack_by=words"], "data.pack_by is 'words'"),
        (MINIMAL, ["teachers=[]"], "teachers is empty"),
        (MINIMAL.replace("model: m", "weight: 1.0"), [], "expected a model, a cache, or both"),
    ],
)
def test_configuration_errors_come_before_anything_is_loaded(tmp_path, text, overrides, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ChassisError, match=message):
        load_config(tmp_path / "c.yaml", overrides).check()


def test_overrides_and_ranks(tmp_path):
    (tmp_path / "c.yaml").write_text(MINIMAL)
    found = load_config(tmp_path / "c.yaml", ["training.steps=7", "teachers.0.weight=0.25", "data.train=[a,b]"])
    assert (found.training.steps, found.teachers[0].weight, found.data.train) == (7, 0.25, ["a", "b"])
    with pytest.raises(ChassisError, match="on 3 ranks: expected a multiple of 3"):
        found.check(ranks=3)
    with pytest.raises(ChassisError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "examples").glob("*.yaml")), ids=lambda p: p.stem)
def test_exemplars_are_sound(path):
    found = load_config(path)
    found.check(ranks=8)
    assert found.teachers and found.training.steps >= 100


# -- text ---------------------------------------------------------------------------------------------------------------


def documents(*texts):
    return [Document.from_text(text, "test") for text in texts]


def test_packing_joins_and_cuts_and_loses_nothing():
    texts = ["aa", "bbb", "c" * 7, "line one\nline two\nline three", "d"]
    packed = list(pack(documents(*texts), 10))
    assert packed == ["aa\nbbb", "c" * 7, "line one", "line two", "line three", "d"]
    assert all(len(text) <= 10 for text in packed)
    assert "".join("".join(packed).split()) == "".join("".join(texts).split())


def test_packing_by_tokens(tiny_tokenizer):
    text = "the quick brown fox jumps over the lazy dog " * 9
    packed = list(pack(documents(text, "short"), 16, "tokens", tiny_tokenizer))
    assert all(len(tiny_tokenizer(part)["input_ids"]) <= 16 for part in packed[:-1])
    assert "".join("".join(packed).split()) == "".join((text + "short").split())
    with pytest.raises(ChassisError, match="packing by 'words'"):
        list(pack(documents(text), 16, "words"))


def test_batches_count_what_the_losses_count(config):
    student = load_tokenizer(config.student)
    config.teachers[0].projection = "tokenizers"
    sides = load_sides(config, student, [])
    samples = [{"text": "def f(x):\n    return x", "index": 0}, {"text": "import os", "index": 1, "sample_mask": 0.0}]
    batch = Collator(student, sides.tokenizers, sides.exact_only, 64)(samples)
    spans = [text_spans(t, [s["text"] for s in samples]) for t in (student, sides.tokenizers[0])]
    chunks = align(*spans).chunks
    counted = layout(chunks, torch.tensor([1.0, 0.0]), False, torch.float64).counted.sum()
    n_tokens = int(spans[0].mask[0].sum()) - 1
    assert batch["counts"].tolist() == [n_tokens, int(counted), n_tokens]
    assert batch["n_bytes"].tolist() == [len(s["text"].encode()) for s in samples]  # it opens with <s>
    assert torch.equal(batch["teachers"][0]["student"], chunks.student) and batch["teachers"][1] == {}


# -- caches -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(tiny_testbed, tmp_path):
    model, tokenizer = load_causal_lm(tiny_testbed.other_expert)
    texts = [f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 3) for i in range(7)]

    def write(folder=tmp_path / "cache", texts=texts, **options):
        options = {"name": "teacher", "max_tokens": 24, "top_k": 8, "samples_per_shard": 3, "batch_size": 2} | options
        return write_cache(folder, model, tokenizer, texts, **options)

    return tmp_path / "cache", write, model, tokenizer, texts


def test_a_cache_holds_the_largest_log_probabilities(cached):
    folder, write, model, tokenizer, texts = cached
    assert write().done == 7
    spans = text_spans(tokenizer, texts[2:4], max_length=24)
    ids = torch.from_numpy(spans.ids)
    found = Cache(folder).batch([2, 3], ids)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.from_numpy(spans.mask).long()).logits
    expected, columns = logits[..., : len(tokenizer)].log_softmax(-1).topk(8)
    real = torch.from_numpy(spans.mask)
    assert torch.equal(found["top_ids"][real], columns[real])
    torch.testing.assert_close(found["top_log_probs"][real].float(), expected[real], atol=5e-3, rtol=1e-3)
    assert (found["top_ids"][~real] == -1).all()


def test_a_killed_cache_goes_on_where_it_was(cached, tmp_path):
    folder, write, *_ = cached

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(progress=stop)
    with pytest.raises(ChassisError, match="3 of 7 samples are cached"):
        Cache(folder)
    first = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    calls = []
    write(progress=lambda done, total: calls.append(done))
    assert calls == [6, 7] and (folder / "shard-00000.safetensors").stat().st_mtime_ns == first
    whole = write(tmp_path / "whole")
    for file in whole.shards:
        a, b = load_file(folder / file), load_file(tmp_path / "whole" / file)
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_bad_caches_are_refused_by_name(cached):
    folder, write, _, tokenizer, texts = cached
    write()
    with pytest.raises(ChassisError, match="holds a cache with other top_k"):
        write(top_k=4)
    with pytest.raises(ChassisError, match="holds a cache with other .*fingerprint"):
        write(texts=texts[:-1] + ["other"])
    with pytest.raises(ChassisError, match="was made of other samples"):
        Cache(folder).check_samples(texts[1:])
    with pytest.raises(ChassisError, match="sample 0 was cut into other tokens"):
        Cache(folder).batch([0], torch.zeros(1, 30, dtype=torch.int64))
    with pytest.raises(ChassisError, match="no sample 7"):
        Cache(folder).batch([7], torch.zeros(1, 30, dtype=torch.int64))
    shard = folder / "shard-00001.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1])
    with pytest.raises(ChassisError, match=f"shard-00001.safetensors is {len(good) - 1} bytes long"):
        Cache(folder)
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ChassisError, match="shard-00001.safetensors was altered"):
        Cache(folder).batch([3], torch.zeros(1, 30, dtype=torch.int64))
    shard.unlink()
    with pytest.raises(ChassisError, match="shard-00001.safetensors is missing"):
        Cache(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(ChassisError, match="damaged"):
        read_index(folder)
    with pytest.raises(ChassisError, match="no teacher cache"):
        read_index(folder / "none")


# -- training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [Loss(), Loss(gold_loss=True), Loss(temperature=2.0)], ids=["p-kl", "gold", "tempered"])
def test_losses_do_not_depend_on_the_micro_batch(config, loss, tmp_path):
    config.loss = loss
    whole = distill(config)
    parts = distill(replace(config, out=str(tmp_path / "parts"), training=replace(config.training, micro_batch_size=1)))
    for name in ("kl_loss", "ce_loss", "kl_loss_t0", "loss", "grad_norm", "kl_loss_scale"):
        assert logged(parts, name) == pytest.approx(logged(whole, name), rel=1e-4), name
    for name in ("eval_bits_per_byte", "eval_kl_loss_t0", "eval_kl_loss_t1", "eval_accuracy"):
        assert logged(parts, name) == pytest.approx(logged(whole, name), rel=1e-4), name
    assert len(logged(whole, "eval_bits_per_byte")) == 2  # the no-op and the end


@pytest.mark.parametrize("loss", [Loss(kd_loss_mode="select_teacher"), Loss(sum_weights_metric="max_prob")], ids=str)
def test_every_mode_trains_and_is_logged(config, loss):
    config.loss = loss
    results = distill(config)
    if loss.kd_loss_mode == "select_teacher":
        shares = [sum(pair) for pair in zip(logged(results, "selected_t0"), logged(results, "selected_t1"), strict=True)]
        assert shares == [1.0] * 3
    else:
        weights = zip(logged(results, "weight_t0"), logged(results, "weight_t1"), strict=True)
        assert [sum(pair) for pair in weights] == pytest.approx([1.0] * 3)
    assert all(torch.tensor(logged(results, "loss")).isfinite())


def test_a_run_stopped_anywhere_goes_on_with_the_same_losses(config, tmp_path):
    config.training = replace(config.training, steps=5, save_every=2)
    whole = distill(config)

    class Stop(Exception):
        pass

    def stop(stage, done, total):
        if done == 3:
            raise Stop

    again = replace(config, out=str(tmp_path / "again"))
    with pytest.raises(Stop):
        distill(again, stop)
    resumed = distill(again)
    for name in ("loss", "kl_loss", "kl_loss_scale", "grad_norm", "learning_rate"):
        assert logged(resumed, name)[-3:] == logged(whole, name)[-3:], name
    with pytest.raises(ChassisError, match="holds checkpoints of a run with other training"):
        distill(replace(again, training=replace(config.training, learning_rate=1e-4)))
    student = [load_file(tmp_path / name / "student/model.safetensors") for name in ("out", "again")]
    assert all(torch.equal(student[0][k], student[1][k]) for k in student[0])


def test_a_cached_teacher_gives_what_the_live_one_gives(config, tiny_testbed, tmp_path):
    size = len(load_tokenizer(tiny_testbed.other_expert))
    config.teachers = [Teacher(model=str(tiny_testbed.other_expert))]
    live = distill(config)
    config.teachers[0].cache = str(tmp_path / "cache")
    config.cache.top_k = size
    with pytest.raises(ChassisError, match="no teacher cache"):
        distill(replace(config, out=str(tmp_path / "early")))
    written = write_caches(config, lambda *_: None)
    assert [c["samples"] for c in written] == [len(d) for d in datasets(config, load_tokenizer(config.student))]
    config.teachers[0].model = None
    cached = distill(replace(config, out=str(tmp_path / "cached")))
    for name in ("kl_loss", "ce_loss", "eval_kl_loss_t0"):
        assert logged(cached, name) == pytest.approx(logged(live, name), rel=0.02), name  # float16 on disk


def test_hidden_states_give_what_the_logits_give(config, tmp_path):
    config.loss = Loss(vocab_topk=64)
    hidden = distill(config)
    for teacher in config.teachers:
        teacher.full_logits = True
    logits = distill(replace(config, out=str(tmp_path / "logits")))
    for name in ("loss", "kl_loss_t0", "kl_loss_t1", "grad_norm", "eval_kl_loss_t0", "eval_kl_loss_t1"):
        assert logged(hidden, name) == pytest.approx(logged(logits, name), rel=1e-5), name


@pytest.mark.parametrize(
    "options,form",
    [({"vocab_topk": 64}, TeacherHead), ({}, torch.Tensor), ({"vocab_topk": 64, "sum_weights_metric": "ce"}, torch.Tensor)],
    ids=["few columns", "all columns", "scored teachers"],
)
def test_a_teacher_gives_logits_only_where_the_loss_reads_them_all(config, options, form):
    config.loss = Loss(**options)
    student = load_tokenizer(config.student)
    sides = load_sides(config, student, ["def f(x):"])
    teachers = [load_teacher(config, sides, i) for i in range(2)]
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


def test_a_head_of_another_kind_is_refused_or_taken_as_logits(config, monkeypatch):
    config.loss = Loss(vocab_topk=64)
    sides = load_sides(config, load_tokenizer(config.student), ["def f(x):"])

    def refuse(model):
        raise ModelError("its logits are not softcap(scale * (h Wᵀ + b))")

    monkeypatch.setattr("chassis.distill.run.inspect_head", refuse)
    with pytest.raises(ChassisError, match=r"teachers\.0: its logits are not .*teachers\.0\.full_logits=true"):
        load_teacher(config, sides, 0)
    config.teachers[0].full_logits = True
    assert load_teacher(config, sides, 0).head is None


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


def test_the_exemplar_under_torchrun_equals_one_process(config, work, tmp_path):
    config.training = replace(config.training, batch_size=4, micro_batch_size=2)
    alone = distill(config)
    exemplar = Path(__file__).parents[1] / "examples/several-teachers.yaml"
    data = {
        "train": [str(work / "fit.jsonl")],
        "validation": [str(work / "validation.jsonl")],
        "max_validation_samples": "null",
    }
    overrides = {f"data.{k}": v for k, v in (vars(config.data) | data).items()}
    overrides |= {f"training.{k}": list(v) if k == "betas" else v for k, v in vars(config.training).items()}
    overrides |= {"training.activation_checkpointing": "false"}
    for i, teacher in enumerate(config.teachers):
        overrides |= {f"teachers.{i}.{k}": v for k, v in vars(teacher).items() if k in ("model", "weight", "projection")}
    overrides |= {"student": config.student, "out": tmp_path / "two"}
    words = [f"{key}={'null' if value is None else value}" for key, value in overrides.items()]
    command = "import sys; from chassis.cli import main; sys.argv = ['chassis', *sys.argv[1:]]; main()"
    (tmp_path / "run.py").write_text(command)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
        + ["--rdzv-endpoint", "localhost:0", str(tmp_path / "run.py"), "distill", "--config", str(exemplar), *words],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two/results.json").read_text())
    for name in ("kl_loss", "ce_loss", "kl_loss_scale", "grad_norm", "eval_bits_per_byte", "eval_kl_loss_t0"):
        assert logged(two, name) == pytest.approx(logged(alone, name), rel=1e-4), name


def test_too_little_text_and_other_vocabularies_are_refused(config, tiny_testbed):
    config.training = replace(config.training, batch_size=400)
    with pytest.raises(ChassisError, match="training.batch_size is 400"):
        distill(config)
    config.training = replace(config.training, batch_size=4)
    config.teachers[0].projection = None
    with pytest.raises(ChassisError, match="have different vocabularies"):
        distill(config)
