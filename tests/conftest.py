"""What several test files share: the testbed, trained once per cache, and random models built on the spot."""

import importlib.util
import json
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: its kernels run on CPU tensors

SPLITS = {"train": "fit", "validation": "validation"}
SMALL = {"initializer_range": 0.2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 0}
BLOCKS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, **SMALL}
LLAMA_LIKE = {"intermediate_size": 48, "num_key_value_heads": 2, **BLOCKS}
ARCHITECTURES = {
    "llama": LLAMA_LIKE,
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **SMALL},
    "gpt_neox": {"intermediate_size": 48, "rotary_pct": 0.5, **BLOCKS},
    "qwen3": {"head_dim": 8, **LLAMA_LIKE},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, **LLAMA_LIKE},
    "cohere": {"logit_scale": 0.25, **LLAMA_LIKE},
    "granite": {"logits_scaling": 8.0, **LLAMA_LIKE},
}


@pytest.fixture(scope="session")
def testbed():
    """The three trained models and their text; the first session on a machine trains them, which takes minutes."""
    from chassis.testbed import build

    return build()


@pytest.fixture(scope="session")
def tiny_testbed():
    """Models of a few training steps: for plumbing, not for figures."""
    from chassis.testbed import build

    return build(size="tiny")


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Byte-level BPE of 300 tokens without a padding token."""
    from chassis.testbed.tokenizers import byte_level

    return byte_level(["the quick brown fox jumps over the lazy dog, " * 3, "def f(x):\n    return x + 1\n"] * 4, 300)


@pytest.fixture(scope="session")
def tiny_lm(tiny_tokenizer):
    """Factory of random-weight models: `tiny_lm("llama", seed=0, tie_word_embeddings=False)`, width 32, three blocks."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(architecture: str = "llama", *, seed: int = 0, **overrides):
        settings = {"vocab_size": len(tiny_tokenizer), **ARCHITECTURES[architecture], **overrides}
        config = AutoConfig.for_model(architecture, **settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config).eval()

    return make


@pytest.fixture
def plugged(tiny_lm, tiny_tokenizer):
    """A random base and an adapter of rank 6 fitted to an expert near it."""
    from support import fitted, pair

    base, expert = pair(tiny_lm, tiny_tokenizer)
    return base, fitted(base, expert, tiny_tokenizer)


@pytest.fixture
def ids(tiny_tokenizer):
    """Token ids [1, 20] of a document."""
    from support import documents

    return tiny_tokenizer(documents(1)[0].text, return_tensors="pt")["input_ids"][:, :20]


@pytest.fixture(scope="session")
def distill_documents(tiny_testbed, tmp_path_factory):
    """A folder with some short documents to train a student on and to measure it on: fit.jsonl and validation.jsonl."""
    folder = tmp_path_factory.mktemp("distill")
    for split in ("fit", "validation"):
        documents = tiny_testbed.documents["source"][split][:4]
        texts = [document.text[start : start + 300] for document in documents for start in range(0, 1500, 300)]
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


@pytest.fixture
def distilling(tiny_testbed, distill_documents, tmp_path):
    """A DistillConfig of three steps with two teachers, one of another tokenizer; to be changed and run."""
    from chassis.distill.config import Data, DistillConfig, Teacher, Training

    sources = {name: [str(distill_documents / f"{split}.jsonl")] for name, split in SPLITS.items()}
    steps = {"steps": 3, "warmup_steps": 1, "evaluate_every": 3, "save_every": 100}
    return DistillConfig(
        student=str(tiny_testbed.base),
        out=str(tmp_path / "out"),
        teachers=[Teacher(model=str(tiny_testbed.other_expert)), Teacher(model=str(tiny_testbed.expert), weight=0.5)],
        data=Data(**sources, pack_length=300, max_tokens=64),
        training=Training(batch_size=4, micro_batch_size=4, learning_rate=1e-3, **steps),
    )


@pytest.fixture(scope="session", autouse=True)
def bfloat16_rounds_to_nearest():
    """As on every GPU: Triton's interpreter would cut the last 16 bits off."""
    if not os.environ.get("TRITON_INTERPRET") or not importlib.util.find_spec("triton"):
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def cast(self, source, wanted):
        kinds = source.dtype.scalar, wanted.scalar
        if kinds == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(source.data).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return TensorHandle(np.where(np.isnan(source.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return original(self, source, wanted)

    original, InterpreterBuilder.cast_impl = InterpreterBuilder.cast_impl, cast


@pytest.fixture
def int32_overflow_stops(monkeypatch):
    """Triton's interpreter raises where an int32 product or sum overflows, and copies no storage onto itself afterwards."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True))
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
