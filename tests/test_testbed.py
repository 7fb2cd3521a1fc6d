import json
import math
import sys
import threading
import time

import pytest
import torch
from chassis.errors import ChassisError
from chassis.models import inspect_head, load_causal_lm
from chassis.testbed import DOMAINS, HELD_OUT, build, cache_folder
from chassis.testbed.corpus import standard_library
from chassis.testbed.make import _run_together
from chassis.testbed.recipe import Schedule
from chassis.testbed.train import bits_per_byte, token_stream, train
from chassis.text.corpus import Document, load_documents

NAMES = ("base", "expert", "other_expert")
SAMPLES = ["def f(x):\n    return x\n", "tabs\tand\r\nlines", "héllo – naïve", "日本語 🙂", "a  b   c    d"]
SAMPLES += ["<0x0A> </s> <s> <|endoftext|>", " led by a space"]


def models(testbed):
    return testbed.manifest["models"]


def long_lines(documents, longer=40):
    return {line.strip() for d in documents for line in d.text.splitlines() if len(line.strip()) > longer}


def test_other_expert_knows_source_much_better_than_the_base(testbed):
    base, other = (models(testbed)[name]["bits_per_byte"]["source"] for name in ("base", "other_expert"))
    assert other <= 0.85 * base


def test_expert_knows_source_better_and_paid_little_on_prose(testbed):
    base, expert = (models(testbed)[name]["bits_per_byte"] for name in ("base", "expert"))
    assert expert["source"] <= 0.88 * base["source"]
    assert expert["prose"] <= 1.08 * base["prose"]


def test_manifest_tells_what_was_made(testbed):
    assert [models(testbed)[name]["steps"] for name in NAMES] == [600, 250, 400]
    assert json.loads((testbed.base.parent / "manifest.json").read_text()) == testbed.manifest
    for name in NAMES:
        model, tokenizer = load_causal_lm(getattr(testbed, name))
        made = models(testbed)[name]
        assert made["parameters"] == sum(p.numel() for p in model.parameters())
        assert made["vocabulary"] == len(tokenizer) == model.config.vocab_size
    assert models(testbed)["base"]["width"] != models(testbed)["other_expert"]["width"]


def test_figure_of_the_manifest_is_that_of_the_saved_model(testbed):
    recipe = testbed.manifest["recipe"]
    openings = [
        Document.from_text(d.text[: recipe["scored_characters"]], d.source) for d in testbed.documents["prose"]["test"]
    ]
    figure = bits_per_byte(*load_causal_lm(testbed.expert), openings, recipe["length"])
    assert figure == pytest.approx(models(testbed)["expert"]["bits_per_byte"]["prose"], rel=1e-3)


def test_heads_are_untied_in_the_base_and_tied_in_the_other_expert(testbed):
    heads = [inspect_head(load_causal_lm(getattr(testbed, name))[0]) for name in NAMES]
    assert [head.tied for head in heads] == [False, False, True]


def test_there_is_enough_text_to_fit_and_to_score(testbed):
    _, tokenizer = load_causal_lm(testbed.base)
    tokens = {split: len(token_stream(tokenizer, testbed.documents["source"][split])) for split in HELD_OUT}
    assert tokens["fit"] >= 130_000 and tokens["validation"] >= 15_000 and tokens["test"] >= 30_000


def test_splits_share_no_document(testbed):
    groups = [testbed.training[d] for d in DOMAINS] + [testbed.documents[d][s] for d in DOMAINS for s in HELD_OUT]
    ids = [document.id for group in groups for document in group]
    assert len(ids) == len(set(ids)) and all(groups)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_scored_text_does_not_repeat_what_models_and_adapters_learn(testbed, split):
    learnt = [testbed.training[d] for d in DOMAINS] + [testbed.documents[d]["fit"] for d in DOMAINS]
    seen = set().union(*map(long_lines, learnt))
    for domain in DOMAINS:
        lines = long_lines(testbed.documents[domain][split])
        assert len(lines & seen) <= 0.05 * len(lines)


def test_docstrings_follow_their_module(testbed):
    held_out = {d.source.partition(":")[2] for split in HELD_OUT for d in testbed.documents["source"][split]}
    assert held_out.isdisjoint(d.source.partition(":")[2] for d in testbed.training["prose"])


def test_files_hold_the_same_documents(testbed):
    for domain in DOMAINS:
        for split in HELD_OUT:
            from_file = load_documents(testbed.data / f"{domain}_{split}.jsonl")
            assert [d.id for d in from_file] == [d.id for d in testbed.documents[domain][split]]


def test_library_without_documentation_topics_still_gives_prose(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert sum(len(d.text) for d in standard_library()["prose"]["train"]) > 400_000


@pytest.mark.parametrize("name", ["base", "other_expert"])
@pytest.mark.parametrize("text", SAMPLES)
def test_tokenizers_lose_nothing(testbed, name, text):
    _, tokenizer = load_causal_lm(getattr(testbed, name))
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids


def test_byte_tokens_are_part_of_the_vocabulary_and_not_special(testbed):
    _, tokenizer = load_causal_lm(testbed.base)
    assert tokenizer.tokenize("\t") == ["▁", "<0x09>"]
    assert tokenizer.convert_tokens_to_ids("<0x09>") not in tokenizer.all_special_ids
    assert "<0x09>" not in tokenizer.tokenize("<0x09>")


def test_second_build_takes_seconds(testbed):
    started = time.perf_counter()
    assert build().manifest == testbed.manifest
    assert time.perf_counter() - started < 5


def fake_make(calls, seconds=0.0, fail=False):
    def make(folder, recipe, progress):
        calls.append(folder)
        (folder / "data").mkdir()
        time.sleep(seconds)
        if fail:
            raise KeyboardInterrupt
        for domain in DOMAINS:
            for split in ("train", *HELD_OUT):
                (folder / "data" / f"{domain}_{split}.jsonl").touch()
        (folder / "manifest.json").write_text("{}")

    return make


@pytest.fixture()
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CHASSIS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_killed_build_leaves_nothing_behind(monkeypatch, own_cache):
    calls = []
    monkeypatch.setattr("chassis.testbed.make.make", fake_make(calls, fail=True))
    with pytest.raises(KeyboardInterrupt):
        build(size="tiny", progress=False)
    assert not cache_folder("tiny").exists() and not calls[0].exists()
    left_over = cache_folder("tiny").parent / f".{cache_folder('tiny').name}.killed"
    left_over.mkdir()
    monkeypatch.setattr("chassis.testbed.make.make", fake_make(calls))
    build(size="tiny", progress=False)
    assert not left_over.exists() and (cache_folder("tiny") / "manifest.json").exists()


def test_two_builds_at_once_train_once(monkeypatch, own_cache):
    calls = []
    monkeypatch.setattr("chassis.testbed.make.make", fake_make(calls, seconds=0.3))
    threads = [threading.Thread(target=build, kwargs={"size": "tiny", "progress": False}) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_failure_of_one_training_stops_the_other():
    stopped = threading.Event()

    def fails():
        raise MemoryError("none left")

    def runs_until_stopped():
        assert stopped.wait(timeout=30)
        return {}

    with pytest.raises(MemoryError, match="none left"):
        _run_together(stopped, runs_until_stopped, fails)


def test_cache_that_cannot_be_written_is_a_clear_error(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CHASSIS_CACHE", str(tmp_path / "file"))
    with pytest.raises(ChassisError, match="set CHASSIS_CACHE"):
        build(size="tiny")


def test_cache_key_changes_with_recipe_and_torch(monkeypatch, own_cache):
    small = cache_folder()
    assert cache_folder("tiny") != small and small.is_relative_to(own_cache)
    monkeypatch.setattr("torch.__version__", "0")
    assert cache_folder() != small


def test_unknown_size():
    with pytest.raises(ChassisError, match="expected one of 'small', 'tiny'"):
        build(size="huge")


def test_tiny_testbed_learns(tiny_testbed):
    base, expert = (models(tiny_testbed)[name]["bits_per_byte"]["source"] for name in ("base", "expert"))
    assert expert < base < 8


def test_uniform_model_costs_the_logarithm_of_its_vocabulary(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama", tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    documents = [Document.from_text(text * 9, "made") for text in SAMPLES]
    n_tokens = sum(len(tiny_tokenizer(d.text, split_special_tokens=True)["input_ids"]) for d in documents)
    n_bytes = sum(len(d.text.encode()) for d in documents)
    want = n_tokens * math.log2(len(tiny_tokenizer)) / n_bytes
    assert bits_per_byte(model, tiny_tokenizer, documents, length=16) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("muon_rate", [None, 1e-2])
def test_training_is_repeatable_and_learns(tiny_lm, muon_rate):
    stream = torch.arange(200) % 7 + 1
    schedule = Schedule(20, 1e-2, muon_rate)
    weights = []
    for _ in range(2):
        model = tiny_lm("qwen3")
        train(model, [stream], schedule, batch=4, length=16, seed=0)
        weights.append(model.lm_head.weight.detach())
    assert torch.equal(*weights)
    with torch.no_grad():
        loss = model(input_ids=stream[None, :17], labels=stream[None, :17]).loss
    assert loss < 0.5 * math.log(model.config.vocab_size)
