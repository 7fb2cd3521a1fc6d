"""Distillation before a step is made: configuration, packing, batches and the caches of teachers."""

from pathlib import Path

import pytest
import torch
from chassis.distill.cache import Cache, read_index, write_cache
from chassis.distill.collator import Collator
from chassis.distill.config import load_config
from chassis.distill.inputs import load_sides
from chassis.distill.packing import pack
from chassis.errors import ChassisError
from chassis.models import load_causal_lm, load_tokenizer
from chassis.text.alignment import align
from chassis.text.corpus import Document
from chassis.text.spans import text_spans
from safetensors.torch import load_file

from chassis_kernels.chunks import layout

MINIMAL = "student: a\nout: o\ndata: {train: [x]}\nteachers: [{model: m}]\n"


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
        (MINIMAL, ["training.fsdp=true"], "start it with torchrun"),
        (MINIMAL, ["training.fused_head=true", "loss.gold_loss=true"], "training.fused_head: gold_loss compares all logits"),
        (MINIMAL, ["training.fused_head=true", "teachers.0.projection=null"], "one teacher, with another tokenizer"),
        (MINIMAL, ["training.fused_head=true", "loss.compat=true"], "set dynamic_loss_scaling=false"),
        (MINIMAL, ["training.fused_head=true", "loss.kl_loss_weight=0"], "kl_loss_weight is 0.0: expected more than 0"),
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
    found.training.fsdp = found.training.fused_head = True
    with pytest.raises(ChassisError, match="training.fsdp shards it"):
        found.check(ranks=2)
    with pytest.raises(ChassisError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "examples").glob("*.yaml")), ids=lambda p: p.stem)
def test_exemplars_are_sound(path):
    found = load_config(path)
    found.check(ranks=8)
    assert found.teachers and found.training.steps >= 100


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


def test_batches_count_what_the_losses_count(distilling):
    student = load_tokenizer(distilling.student)
    distilling.teachers[0].projection = "tokenizers"
    sides = load_sides(distilling, student, [])
    samples = [{"text": "def f(x):\n    return x", "index": 0}, {"text": "import os", "index": 1, "sample_mask": 0.0}]
    batch = Collator(student, sides.tokenizers, sides.exact_only, 64)(samples)
    spans = [text_spans(t, [s["text"] for s in samples]) for t in (student, sides.tokenizers[0])]
    chunks = align(*spans).chunks
    counted = layout(chunks, torch.tensor([1.0, 0.0]), False, torch.float64).counted.sum()
    n_tokens = int(spans[0].mask[0].sum()) - 1
    assert batch["counts"].tolist() == [n_tokens, int(counted), n_tokens]
    assert batch["n_bytes"].tolist() == [len(s["text"].encode()) for s in samples]  # it opens with <s>
    assert torch.equal(batch["teachers"][0]["student"], chunks.student) and batch["teachers"][1] == {}


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
