"""Merging: a plain checkpoint that speaks like the attached adapter, written whole or not at all, in bounded memory."""

import json
import os
import resource
import signal

import chassis.merge
import pytest
import torch
from chassis.bias import LogitBias
from chassis.errors import ChassisError
from chassis.merge import merge, merge_to
from chassis.models import load_causal_lm, vocabulary_hash
from chassis.port import attach
from safetensors.torch import load_file, save_file
from support import LiveMemory, fitted, pair

GREEDY = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
ARCHITECTURES = {
    "llama": {"tie_word_embeddings": False},
    "tied llama": {"tie_word_embeddings": True},
    "gpt2": {},
    "gpt_neox": {},
    "gemma2": {"tie_word_embeddings": True},
}


@pytest.fixture
def saved(tiny_lm, tiny_tokenizer, tmp_path):
    """Makes a base on disk in small shards, and an adapter for it: (base, adapter, folder)."""

    def make(name="llama", columns=None, dtype=torch.float32, shard="20KB", rank=6):
        base, expert = pair(tiny_lm, tiny_tokenizer, name.split()[-1], **ARCHITECTURES[name])
        adapter = fitted(base, expert, tiny_tokenizer, rank, columns)
        base.model.to(dtype).save_pretrained(tmp_path / "base", max_shard_size=shard)
        tiny_tokenizer.save_pretrained(tmp_path / "base")
        return base, adapter, tmp_path / "base"

    return make


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("columns", [None, 40])
@pytest.mark.parametrize("tied", [False, True])
def test_merged_model_speaks_like_the_folded_adapter(tiny_lm, tiny_tokenizer, ids, tied, columns):
    base, expert = pair(tiny_lm, tiny_tokenizer, tie_word_embeddings=tied)
    adapter = fitted(base, expert, tiny_tokenizer, columns=columns)
    with attach(base.model, adapter.fold_bias()):
        wanted = logits(base.model, ids)
    embedding = base.model.get_input_embeddings().weight.clone()
    notices = merge(base.model, adapter, tiny_tokenizer)
    torch.testing.assert_close(logits(base.model, ids), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(base.model.get_input_embeddings().weight, embedding)
    assert any("tied" in notice for notice in notices) == tied and any("no bias" in notice for notice in notices)


def test_a_head_with_a_bias_is_merged_exactly(tiny_lm, tiny_tokenizer, ids):
    base, expert = pair(tiny_lm, tiny_tokenizer)
    base.head.unembedding.bias = torch.nn.Parameter(torch.randn(base.head.vocab_size))
    adapter = fitted(base, expert, tiny_tokenizer)
    with attach(base.model, adapter):
        wanted = logits(base.model, ids)
    assert merge(base.model, adapter) == []
    torch.testing.assert_close(logits(base.model, ids), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_a_checkpoint_on_disk_is_merged_as_the_loaded_model(saved, ids, tmp_path, monkeypatch, name, shard):
    """Block by block and shard by shard: the same bits as in memory, the same text as attached, nothing else changed."""
    base, adapter, folder = saved(name, shard=shard)
    monkeypatch.setattr(chassis.merge, "BLOCK", 11 * base.head.width)
    with attach(base.model, adapter.fold_bias()):
        spoken, wanted = base.model.generate(ids, **GREEDY), logits(base.model, ids)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    notices = merge_to(folder, adapter, tmp_path / "merged")
    assert merge(base.model, adapter) == notices
    again, tokenizer = load_causal_lm(tmp_path / "merged")
    for (one, a), (other, b) in zip(again.named_parameters(), base.model.named_parameters(), strict=True):
        assert one == other and torch.equal(a, b)
    torch.testing.assert_close(logits(again, ids), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(again.generate(ids, **GREEDY), spoken)
    assert vocabulary_hash(tokenizer) == base.vocabulary_hash
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    many = len(list((tmp_path / "merged").glob("*.safetensors")))
    assert many == len(list(folder.glob("*.safetensors"))) + base.head.tied and (many > 3) == (shard == "20KB")


@pytest.mark.parametrize("columns", [None, 40])
def test_a_bias_beside_the_weights_is_exact(saved, ids, tmp_path, columns):
    base, adapter, folder = saved(columns=columns)
    notices = merge_to(folder, adapter, tmp_path / "merged", bias="side")
    assert "LogitBias" in notices[0]
    merged, _ = load_causal_lm(tmp_path / "merged")
    processor = LogitBias.load(tmp_path / "merged")
    for options in (
        {},
        {"do_sample": True, "top_k": 0},
        {"num_beams": 3, "num_return_sequences": 3, "renormalize_logits": True},
    ):
        torch.manual_seed(0)
        found = merged.generate(ids, **GREEDY | options, logits_processor=[processor])
        with attach(base.model, adapter):
            torch.manual_seed(0)
            assert torch.equal(found, base.model.generate(ids, **GREEDY | options))
            wanted = logits(base.model, ids)
    torch.testing.assert_close(processor(None, logits(merged, ids)), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ChassisError, match="a bias of 300 tokens for logits of 10"):
        processor(None, torch.zeros(1, 10))
    with pytest.raises(ChassisError, match="no readable logit_bias/bias.safetensors"):
        LogitBias.load(folder)


def test_a_bias_cannot_be_put_behind_a_cap(saved, tmp_path):
    _, adapter, folder = saved("gemma2")
    with pytest.raises(ChassisError, match="caps its logits at 3 after the bias"):
        merge_to(folder, adapter, tmp_path / "merged", bias="side")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_keep_their_dtype_and_round_once(saved, ids, tmp_path, dtype):
    base, adapter, folder = saved(dtype=dtype)
    merge_to(folder, adapter, tmp_path / "merged")
    again, _ = load_causal_lm(tmp_path / "merged")
    folded = adapter.fold_bias()
    exact = base.head.weight.double() + (folded.U @ folded.V).T.double()
    weight = again.get_output_embeddings().weight
    assert weight.dtype == dtype and (weight.double() - exact).abs().max() <= exact.abs().max() * torch.finfo(dtype).eps
    with attach(base.model, folded):
        wanted = logits(base.model, ids).float()
    assert (logits(again, ids).float() - wanted).norm() < 8 * torch.finfo(dtype).eps * wanted.norm()


def test_names_without_prefix_and_a_head_stored_though_tied_are_merged_as_loaded(saved, ids, tmp_path):
    """Old checkpoints leave the model's prefix out; a stored head that differs from the embedding is the one that counts."""
    _, adapter, folder = saved("gpt2", shard="1GB")
    file = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    for kind, head in {"none": None, "same": tensors["wte.weight"], "own": tensors["wte.weight"] * 2}.items():
        stored = {} if head is None else {"lm_head.weight": head.clone()}
        save_file(tensors | stored, file, metadata={"format": "pt"})
        base, _ = load_causal_lm(folder)
        merge_to(folder, adapter, tmp_path / kind)
        merge(base, adapter)
        assert torch.equal(logits(load_causal_lm(tmp_path / kind)[0], ids), logits(base, ids))


def test_memory_is_for_a_block_and_not_for_the_head(saved, tmp_path, monkeypatch):
    base, adapter, folder = saved(rank=2)
    monkeypatch.setattr(chassis.merge, "BLOCK", 10 * base.head.width)
    head = base.head.weight.numel() * 4
    with LiveMemory() as memory:
        merge_to(folder, adapter, tmp_path / "merged")
    assert memory.peak < head / 3


def test_a_full_disk_leaves_nothing_behind(saved, tmp_path):
    _, adapter, folder = saved()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # no file beyond 4 kB: what a full disk is like
    try:
        with pytest.raises(ChassisError, match="cannot write .*nothing was left behind"):
            merge_to(folder, adapter, tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_too_little_room_is_said_before_anything_is_copied(saved, tmp_path, monkeypatch):
    _, adapter, folder = saved()
    monkeypatch.setattr(chassis.merge.shutil, "disk_usage", lambda path: os.statvfs_result and type("U", (), {"free": 7}))
    with pytest.raises(ChassisError, match="GB are free"):
        merge_to(folder, adapter, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_killed_merge_leaves_no_checkpoint_and_the_next_one_succeeds(saved, tmp_path, monkeypatch):
    _, adapter, folder = saved()
    child = os.fork()
    if not child:
        chassis.merge._merged = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        try:
            merge_to(folder, adapter, tmp_path / "merged")
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (tmp_path / "merged").exists()
    merge_to(folder, adapter, tmp_path / "merged")
    load_causal_lm(tmp_path / "merged")


def test_what_cannot_be_merged_is_refused(saved, tmp_path, tiny_tokenizer):
    base, adapter, folder = saved()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    wrong = dict(match="not empty"), dict(match="expected 'fold' or 'side'"), dict(match="no such folder")
    for (source, target, bias), expected in zip(
        ((folder, "full", "fold"), (folder, "m", "none"), (tmp_path / "nowhere", "m", "fold")), wrong, strict=True
    ):
        with pytest.raises(ChassisError, **expected):
            merge_to(source, adapter, tmp_path / target, bias=bias)
    tiny_tokenizer.__class__(tokenizer_object=tiny_tokenizer.backend_tokenizer).save_pretrained(tmp_path / "bare")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ChassisError, match="no \\*.safetensors"):
        merge_to(tmp_path / "bare", adapter, tmp_path / "m")
    adapter.config.vocabulary_hash = "0" * 64
    with pytest.raises(ChassisError, match="token ids mean other strings"):
        merge_to(folder, adapter, tmp_path / "m")
    adapter.config.vocabulary_hash = ""
    adapter.V *= 1e39
    with pytest.raises(ChassisError, match="NaN or infinite"):
        merge_to(folder, adapter, tmp_path / "m")
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".m*"))
    before = base.head.weight.clone()
    with pytest.raises(ChassisError, match="NaN or infinite"):
        merge(base.model, adapter)
    assert torch.equal(base.head.weight, before)


def test_an_overflow_of_the_head_s_dtype_is_named(saved, tmp_path):
    _, adapter, folder = saved(dtype=torch.float16)
    adapter.V *= 1e7
    with pytest.raises(ChassisError, match="NaN or infinite in float16: merge into a checkpoint in float32 or bfloat16"):
        merge_to(folder, adapter, tmp_path / "m")
