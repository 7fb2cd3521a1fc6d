"""PEFT's format, both ways, with peft itself on the other side; ranks that serving engines take."""

import json

import pytest
import torch
from chassis.bias import LogitBias
from chassis.errors import ChassisError
from chassis.export import SERVED_RANKS, export_peft, import_peft, served_rank
from chassis.merge import merge
from chassis.models import inspect_head
from chassis.port import attach

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("bias", ["lora", "fold", "side"])
def test_peft_loads_the_exported_lora_and_agrees(plugged, ids, tmp_path, bias, pad):
    base, adapter = plugged
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    with attach(base.model, adapter.fold_bias() if bias == "fold" else adapter):
        wanted, spoken = logits(base.model, ids), base.model.generate(ids, **options)
    export_peft(adapter, inspect_head(base.model), tmp_path, bias=bias, pad=pad)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == (8 if pad else 6 + (bias == "fold"))
    processors = [LogitBias.load(tmp_path)] if bias == "side" else []
    loaded = peft.PeftModel.from_pretrained(base.model, tmp_path)
    found = logits(loaded, ids)
    for processor in processors:
        found = processor(None, found)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(loaded.generate(input_ids=ids, **options, logits_processor=processors), spoken)


def test_an_exported_adapter_comes_back_as_the_same_map(plugged, ids, tmp_path):
    base, adapter = plugged
    with attach(base.model, adapter):
        wanted = logits(base.model, ids)
    export_peft(adapter, base.head, tmp_path)
    again = import_peft(tmp_path, base.head, vocabulary_hash=base.vocabulary_hash)
    assert again.rank == adapter.rank and again.config.base == "base"
    with attach(base.model, again, base.tokenizer):
        torch.testing.assert_close(logits(base.model, ids), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ChassisError, match="bias cannot be folded"):
        merge(base.model, again)


@pytest.mark.parametrize("scaled", [{"lora_alpha": 5}, {"lora_alpha": 5, "use_rslora": True}, {"lora_bias": True}])
def test_a_lora_that_peft_wrote_becomes_an_adapter(plugged, ids, tmp_path, scaled):
    base, _ = plugged
    model = peft.get_peft_model(base.model, peft.LoraConfig(target_modules=["lm_head"], r=4, **scaled))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    wanted = logits(model.eval(), ids)
    model.save_pretrained(tmp_path)
    plain = model.unload()
    adapter = import_peft(tmp_path, inspect_head(plain))
    with attach(plain, adapter):
        torch.testing.assert_close(logits(plain, ids), wanted, rtol=1e-4, atol=1e-4)
    if "lora_bias" not in scaled:
        merge(plain, adapter)
        torch.testing.assert_close(logits(plain, ids), wanted, rtol=1e-4, atol=1e-4)


def test_other_loras_are_refused_by_name(plugged, tmp_path):
    base, adapter = plugged
    with pytest.raises(ChassisError, match="no readable LoRA"):
        import_peft(tmp_path, base.head)
    model = peft.get_peft_model(base.model, peft.LoraConfig(target_modules=["lm_head", "q_proj"], r=2))
    model.save_pretrained(tmp_path / "both")
    head = inspect_head(model.unload())
    with pytest.raises(ChassisError, match=r"changes model.layers.0.self_attn.q_proj, .*only a LoRA on 'lm_head' alone"):
        import_peft(tmp_path / "both", head)
    export_peft(adapter, base.head, tmp_path / "own")
    path = tmp_path / "own" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(ChassisError, match="DoRA is not a plain LoRA"):
        import_peft(tmp_path / "own", base.head)


def test_ranks_fit_what_engines_serve_or_the_error_says_so(plugged, tmp_path):
    base, adapter = plugged
    assert [served_rank(rank) for rank in (1, 2, 33, 257, 512)] == [1, 8, 64, 320, 512]
    assert list(SERVED_RANKS) == sorted(SERVED_RANKS)
    with pytest.raises(ChassisError, match="rank 513: serving engines take at most 512"):
        served_rank(513)
    assert any("--max-lora-rank 8" in notice for notice in export_peft(adapter, base.head, tmp_path))
    assert export_peft(adapter, base.head, tmp_path, pad=True) == []
    with pytest.raises(ChassisError, match="bias 'no': expected one of 'lora', 'fold', 'side'"):
        export_peft(adapter, base.head, tmp_path, bias="no")
