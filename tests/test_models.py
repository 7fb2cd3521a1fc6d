import json
import shutil

import pytest
import torch
from chassis.errors import ChassisError
from chassis.models import capture, inspect_head, load_causal_lm, vocabulary_hash
from conftest import ARCHITECTURES
from torch import nn
from transformers import AutoModelForMaskedLM, BertConfig

pytestmark = pytest.mark.filterwarnings("ignore")
EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)
LENGTHS = (7, 3, 5)


def tokens(model, length, seed=0):
    return torch.randint(1, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def padded(rows, side, to):
    """input_ids [B, to] and attention_mask [B, to]."""
    ids = torch.zeros(len(rows), to, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(to - len(row), to)
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


@EVERY
@pytest.mark.parametrize("tied", [False, True])
def test_head_parts_remake_the_logits(tiny_lm, architecture, tied):
    model = tiny_lm(architecture, tie_word_embeddings=tied)
    head = inspect_head(model)
    ids = tokens(model, 12)[None]
    final = capture(model, ids).final
    torch.testing.assert_close(head.logits(final), model(ids).logits, rtol=1e-4, atol=1e-5)
    assert (head.tied, head.width, head.vocab_size, head.n_layers) == (tied, 32, model.config.vocab_size, 3)
    assert head.softcap == ({"gemma2": 3.0}.get(architecture))
    assert head.scale == {"cohere": 0.25, "granite": 1 / 8}.get(architecture, 1.0)
    assert model.get_submodule(head.final_norm_name) is head.final_norm
    assert "norm" in head.final_norm_name or head.final_norm_name.endswith("ln_f")
    assert [model.get_submodule(name) for name in head.block_names] == head.blocks


@EVERY
def test_captured_layers_are_the_hidden_states_of_transformers(tiny_lm, architecture):
    model = tiny_lm(architecture)
    ids = tokens(model, 9)[None]
    hidden = model(ids, output_hidden_states=True).hidden_states
    got = capture(model, ids, layers=range(4), pre_norm=True)
    for layer in range(3):
        torch.testing.assert_close(got.layers[layer], hidden[layer])
    torch.testing.assert_close(got.final, hidden[3])
    assert got.layers[3] is got.pre_norm
    torch.testing.assert_close(inspect_head(model).final_norm(got.pre_norm), got.final)


@EVERY
def test_padding_side_does_not_change_a_row(tiny_lm, architecture):
    model = tiny_lm(architecture)
    rows = [tokens(model, length, seed=length) for length in LENGTHS]
    alone = [capture(model, row[None], layers=(1, 3)) for row in rows]
    for side in ("left", "right"):
        ids, mask = padded(rows, side, to=10)
        got = capture(model, ids, mask, layers=(1, 3))
        for i, want in enumerate(alone):
            keep = mask[i].bool()
            torch.testing.assert_close(got.final[i, keep], want.final[0], rtol=1e-5, atol=1e-5)
            for layer in (1, 3):
                torch.testing.assert_close(got.layers[layer][i, keep], want.layers[layer][0], rtol=1e-5, atol=1e-5)


def test_capture_computes_no_logits_and_leaves_no_hooks(tiny_lm):
    model = tiny_lm()
    capture(model, tokens(model, 5)[None])  # the first call looks at the whole model
    ran = []
    watch = model.lm_head.register_forward_hook(lambda *_: ran.append(1))
    got = capture(model, tokens(model, 5)[None], layers=(0, 2), pre_norm=True)
    assert not ran and not got.final.requires_grad
    watch.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_are_removed_when_the_forward_fails(tiny_lm):
    model = tiny_lm()
    with pytest.raises(IndexError):
        capture(model, torch.tensor([[1, 10**6]]), layers=(0, 1), pre_norm=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_inspection_leaves_the_mode_as_it_was(tiny_lm):
    model = tiny_lm().train()
    inspect_head(model)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype(tiny_lm, dtype):
    model = tiny_lm("gemma2").to(dtype)
    head = inspect_head(model)
    assert (head.scale, head.softcap, head.weight.dtype) == (1.0, 3.0, dtype)
    assert capture(model, tokens(model, 5)[None]).final.dtype == dtype


def test_layers_out_of_range_are_refused(tiny_lm):
    with pytest.raises(ChassisError, match="layers run from 0 to 3, got \\[4, -1\\]"):
        capture(tiny_lm(), torch.tensor([[1, 2]]), layers=(1, 4, -1))


def test_mask_of_another_shape_is_refused(tiny_lm):
    with pytest.raises(ChassisError, match=r"\[1, 2\] and attention_mask \[1, 3\]"):
        capture(tiny_lm(), torch.tensor([[1, 2]]), torch.ones(1, 3))


def test_unembedding_with_bias(tiny_lm):
    model = tiny_lm("llama")
    model.lm_head = nn.Linear(32, model.config.vocab_size)
    head = inspect_head(model)
    assert head.bias.shape == (model.config.vocab_size,)


def test_scale_not_named_in_the_config_is_measured(tiny_lm):
    model = tiny_lm("granite")
    model.config.unheard_of, model.config.logits_scaling = 8.0, 5.0
    assert inspect_head(model).scale == pytest.approx(1 / 5)


def test_logits_made_otherwise_are_refused_but_hidden_states_are_read(tiny_lm):
    class Squashed(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden).sinh()

    model = tiny_lm("llama")
    weight = model.lm_head.weight
    model.lm_head = Squashed(32, model.config.vocab_size, bias=False)
    model.lm_head.weight = weight
    with pytest.raises(ChassisError, match="largest deviation"):
        inspect_head(model)
    assert capture(model, torch.tensor([[1, 2]]), layers=(1,)).final.shape == (1, 2, 32)


def test_model_without_head_is_refused(tiny_lm):
    with pytest.raises(ChassisError, match="no output head"):
        inspect_head(tiny_lm().model)


def test_shared_block_list_is_refused(tiny_lm):
    model = tiny_lm()
    model.model.layers[2] = model.model.layers[1]
    with pytest.raises(ChassisError, match="expected one list of 3 blocks"):
        inspect_head(model)


@pytest.fixture()
def saved(tiny_lm, tiny_tokenizer, tmp_path):
    tiny_lm("qwen3").save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_load_from_a_folder(saved):
    model, tokenizer = load_causal_lm(saved, dtype="bfloat16")
    assert not model.training and model.dtype == torch.bfloat16
    assert tokenizer.pad_token_id == tokenizer.eos_token_id and len(tokenizer) == model.config.vocab_size


def test_padding_token_leaves_the_vocabulary_alone(saved, tiny_tokenizer):
    assert vocabulary_hash(load_causal_lm(saved)[1]) == vocabulary_hash(tiny_tokenizer)


def test_vocabulary_hash_sees_every_token(tiny_tokenizer, testbed):
    _, base = load_causal_lm(testbed.base)
    _, expert = load_causal_lm(testbed.expert)
    assert vocabulary_hash(base) == vocabulary_hash(expert) != vocabulary_hash(tiny_tokenizer)
    before = vocabulary_hash(base)
    base.add_tokens(["<extra>"])
    assert vocabulary_hash(base) != before


def test_missing_folder(tmp_path):
    with pytest.raises(ChassisError, match="no such folder"):
        load_causal_lm(tmp_path / "absent")


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ChassisError, match="no config.json"):
        load_causal_lm(tmp_path)


def test_pickled_weights_are_not_loaded(saved):
    (saved / "model.safetensors").unlink()
    torch.save({}, saved / "pytorch_model.bin")
    with pytest.raises(ChassisError, match="pickled .*convert"):
        load_causal_lm(saved)


def test_missing_tokenizer(saved):
    for path in saved.glob("*token*"):
        path.unlink()
    with pytest.raises(ChassisError, match="tokenizer"):
        load_causal_lm(saved)


def test_checkpoint_without_its_head(saved, tiny_lm):
    tiny_lm("llama").model.save_pretrained(saved)
    with pytest.raises(ChassisError, match="lacks 1 weights .* lm_head.weight"):
        load_causal_lm(saved)


def test_masked_lm_is_not_causal(saved):
    shutil.rmtree(saved)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    AutoModelForMaskedLM.from_config(config).save_pretrained(saved)
    with pytest.raises(ChassisError, match="not a causal LM"):
        load_causal_lm(saved)


@pytest.mark.parametrize("model_type", ["t5", "vit"])
def test_other_kinds_of_model_are_not_causal(saved, model_type):
    (saved / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ChassisError, match="not a causal LM"):
        load_causal_lm(saved)


def test_unknown_architecture(saved):
    (saved / "config.json").write_text(json.dumps({"model_type": "nobody_knows"}))
    with pytest.raises(ChassisError, match="architecture"):
        load_causal_lm(saved)


def test_unreachable_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ChassisError, match="nobody/nothing.*HF_HUB_OFFLINE"):
        load_causal_lm("nobody/nothing")


def test_device_without_numbers(saved):
    with pytest.raises(ChassisError, match="holds no numbers"):
        load_causal_lm(saved, device="meta")


def test_bad_dtype(saved):
    with pytest.raises(ChassisError, match="dtype 'int8'"):
        load_causal_lm(saved, dtype="int8")
