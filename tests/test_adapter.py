"""Adapters on disk and in a model: round trips, refusals, attach and detach, merge, PEFT."""

import json

import pytest
import torch
from chassis.adapter import Adapter
from chassis.closed_form import closed_form
from chassis.errors import ChassisError
from chassis.experts import LogitBiasExpert
from chassis.export import export_peft, merge, merge_to
from chassis.models import inspect_head, load_causal_lm, vocabulary_hash
from chassis.port import attach
from chassis.probes import Probe, make_windows
from chassis.statistics import Statistics
from support import documents, pair


def fitted(base, expert, tokenizer, rank=6, columns=None):
    statistics = Statistics(base.readout, expert.readout)
    for rows in Probe(base.model, expert).batches(make_windows(documents(20), tokenizer, length=48)):
        statistics.update(rows)
    adapter = closed_form(statistics).adapter(rank, columns)
    adapter.config.base, adapter.config.vocabulary_hash = "base", vocabulary_hash(tokenizer)
    return adapter


@pytest.fixture
def plugged(tiny_lm, tiny_tokenizer):
    base, expert = pair(tiny_lm, tiny_tokenizer)
    return base, fitted(base, expert, tiny_tokenizer)


@pytest.fixture
def ids(tiny_tokenizer):
    return tiny_tokenizer(documents(1)[0].text, return_tensors="pt")["input_ids"][:, :20]


def wanted_logits(base, adapter, ids):
    """Base logits plus the change, from the definition."""
    hidden = {}
    handle = base.head.unembedding.register_forward_pre_hook(lambda m, a: hidden.update(h=a[0]), prepend=True)
    base.model(ids)
    handle.remove()
    v, c = adapter.full_columns()
    return base.head.logits(hidden["h"]) + ((hidden["h"] - adapter.mean) @ adapter.U) @ v + c


def test_saved_and_loaded_adapter_is_the_same(plugged, tmp_path):
    _, adapter = plugged
    again = Adapter.load(adapter.save(tmp_path / "a"))
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in adapter.tensors().items())
    assert json.dumps(vars(again.config)) == json.dumps(vars(adapter.config))


def test_damaged_and_foreign_folders_are_refused_by_name(plugged, tmp_path):
    _, adapter = plugged
    with pytest.raises(ChassisError, match="adapter.safetensors is missing"):
        Adapter.load(tmp_path)
    folder = adapter.save(tmp_path / "a")
    file = folder / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ChassisError, match="damaged or truncated"):
        Adapter.load(folder)
    adapter.save(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ChassisError, match="damaged or truncated"):
        Adapter.load(folder)
    (folder / "config.json").write_text('{"format": "other"}')
    with pytest.raises(ChassisError, match="this version reads"):
        Adapter.load(folder)


def test_a_full_disk_leaves_the_old_adapter_whole(plugged, tmp_path, monkeypatch):
    _, adapter = plugged
    folder = adapter.save(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    import chassis.files

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chassis.files.os, "fsync", full)
    with pytest.raises(ChassisError, match="No space left on device"):
        adapter.truncate(2).save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_wrong_base_is_refused(plugged, tiny_lm, tiny_tokenizer):
    _, adapter = plugged
    with pytest.raises(ChassisError, match="width 32 .*this base has width 48"):
        attach(tiny_lm("llama", hidden_size=48), adapter)
    with pytest.raises(ChassisError, match="vocabulary of 300 tokens, this base has 310"):
        attach(tiny_lm("llama", vocab_size=310), adapter)
    other = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    other.add_tokens(["<new>"])
    with pytest.raises(ChassisError, match="token ids mean other strings"):
        attach(tiny_lm("llama"), adapter, other)


def test_attached_logits_are_base_plus_change_and_detach_restores_every_bit(plugged, ids):
    base, adapter = plugged
    with torch.no_grad():
        before = base.model(ids).logits
        with attach(base.model, adapter):
            torch.testing.assert_close(base.model(ids).logits, wanted_logits(base, adapter, ids), rtol=1e-4, atol=1e-4)
        assert torch.equal(base.model(ids).logits, before)


def test_second_attach_is_refused_until_the_first_is_gone(plugged):
    base, adapter = plugged
    first = attach(base.model, adapter)
    with pytest.raises(ChassisError, match="attached to this model already"):
        attach(base.model, adapter)
    first.detach()
    first.detach()
    attach(base.model, adapter).detach()


def test_generate_in_a_left_padded_batch_with_cache_equals_one_by_one(plugged, tiny_tokenizer):
    base, adapter = plugged
    prompts = ["the quick brown", "def x return class", "fox"]
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    with attach(base.model, adapter, tiny_tokenizer):
        alone = []
        for prompt in prompts:
            encoded = tiny_tokenizer(prompt, return_tensors="pt")["input_ids"]
            alone.append(base.model.generate(encoded, **options)[0, encoded.shape[1] :].tolist())
        sequences = [tiny_tokenizer(prompt)["input_ids"] for prompt in prompts]
        width = max(map(len, sequences))
        padded = torch.tensor([[0] * (width - len(s)) + s for s in sequences])
        mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences])
        batch = base.model.generate(padded, attention_mask=mask, **options)[:, width:].tolist()
        no_cache = base.model.generate(padded, attention_mask=mask, use_cache=False, **options)[:, width:].tolist()
    assert batch == alone == no_cache


def test_gradients_flow_through_an_attached_model(plugged, ids):
    base, adapter = plugged
    with attach(base.model, adapter):
        loss = base.model(ids, labels=ids).loss
        loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in base.model.parameters() if p.grad is not None)
    weight = base.head.unembedding.weight
    assert weight.grad.abs().sum() > 0


def test_attached_model_compiles(plugged, ids):
    base, adapter = plugged
    with attach(base.model, adapter), torch.no_grad():
        eager = base.model(ids).logits
        compiled = torch.compile(base.model, backend="aot_eager")(ids).logits
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


def test_folded_bias_is_the_nearest_map_without_one(plugged, tiny_tokenizer):
    base, adapter = plugged
    folded = adapter.fold_bias()
    assert folded.rank == adapter.rank + 1 and not folded.bias.any() and not folded.mean.any()
    windows = make_windows(documents(20), tiny_tokenizer, length=48)
    expert = LogitBiasExpert(base.head, torch.zeros(base.head.vocab_size))
    hidden = torch.cat([rows.final for rows in Probe(base.model, expert).batches(windows)])
    one = hidden @ adapter.constant
    best = torch.linalg.lstsq(hidden.double(), torch.ones(len(hidden), 1, dtype=torch.float64)).solution[:, 0]
    residual, least = (one - 1).square().mean(), (hidden.double() @ best - 1).square().mean()
    assert residual <= 1.01 * least + 1e-6


@pytest.mark.parametrize("columns", [None, 40])
@pytest.mark.parametrize("tied", [False, True])
def test_merged_model_speaks_like_the_folded_adapter(tiny_lm, tiny_tokenizer, ids, tied, columns):
    base, expert = pair(tiny_lm, tiny_tokenizer, tie_word_embeddings=tied)
    adapter = fitted(base, expert, tiny_tokenizer, columns=columns)
    with torch.no_grad():
        with attach(base.model, adapter.fold_bias()):
            wanted = base.model(ids).logits
        embedding = base.model.get_input_embeddings().weight.clone()
        notices = merge(base.model, adapter, tiny_tokenizer)
        torch.testing.assert_close(base.model(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(base.model.get_input_embeddings().weight, embedding)
    assert any("tied" in notice for notice in notices) == tied and any("no bias" in notice for notice in notices)


def test_a_head_with_a_bias_is_merged_exactly(tiny_lm, tiny_tokenizer, ids):
    base, expert = pair(tiny_lm, tiny_tokenizer)
    base.head.unembedding.bias = torch.nn.Parameter(torch.randn(base.head.vocab_size))
    adapter = fitted(base, expert, tiny_tokenizer)
    with torch.no_grad():
        with attach(base.model, adapter):
            wanted = base.model(ids).logits
        assert merge(base.model, adapter) == []
        torch.testing.assert_close(base.model(ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_merged_checkpoint_reloads_as_a_plain_model(plugged, tiny_tokenizer, ids, tmp_path):
    base, adapter = plugged
    merge_to(base.model, tiny_tokenizer, adapter, tmp_path / "merged")
    again, tokenizer = load_causal_lm(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, base.model(ids).logits)
    assert vocabulary_hash(tokenizer) == vocabulary_hash(tiny_tokenizer)
    with pytest.raises(ChassisError, match="not empty"):
        merge_to(base.model, tiny_tokenizer, adapter, tmp_path / "merged")


def test_tied_checkpoint_reloads_untied(tiny_lm, tiny_tokenizer, ids, tmp_path):
    base, expert = pair(tiny_lm, tiny_tokenizer, tie_word_embeddings=True)
    merge_to(base.model, tiny_tokenizer, fitted(base, expert, tiny_tokenizer), tmp_path / "merged")
    again, _ = load_causal_lm(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, base.model(ids).logits)


def test_a_failed_merge_leaves_nothing_behind(plugged, tiny_tokenizer, tmp_path, monkeypatch):
    base, adapter = plugged

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiny_tokenizer, "save_pretrained", full)
    with pytest.raises(ChassisError, match="No space left.*nothing was left behind"):
        merge_to(base.model, tiny_tokenizer, adapter, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bias", ["lora", "fold"])
def test_peft_loads_the_exported_lora_and_agrees(plugged, ids, tmp_path, bias):
    peft = pytest.importorskip("peft")
    base, adapter = plugged
    with torch.no_grad():
        with attach(base.model, adapter if bias == "lora" else adapter.fold_bias()):
            wanted = base.model(ids).logits
        export_peft(adapter, inspect_head(base.model), tmp_path, bias=bias)
        loaded = peft.PeftModel.from_pretrained(base.model, tmp_path)
        torch.testing.assert_close(loaded(ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_nan_adapters_are_not_merged(plugged):
    base, adapter = plugged
    adapter.V[0, 0] = float("nan")
    with pytest.raises(ChassisError, match="NaN"):
        merge(base.model, adapter)
