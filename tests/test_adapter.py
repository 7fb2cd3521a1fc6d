"""Adapters on disk and in a model: round trips, refusals, attach and detach."""

import json

import pytest
import torch
from chassis.adapter import Adapter
from chassis.errors import ChassisError
from chassis.experts import LogitBiasExpert
from chassis.port import attach
from chassis.probes import Probe, make_windows
from support import documents


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
