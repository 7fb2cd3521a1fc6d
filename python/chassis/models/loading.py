"""Load a causal language model and its tokenizer from a folder or the hub, running no code that comes with them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from chassis.errors import ModelError
from chassis.models.forward import check_causal

WEIGHTS = "*.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load_causal_lm(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> tuple[nn.Module, object]:
    """Model (eval mode, on `device`, in `dtype` or the checkpoint's own) and tokenizer of a local folder or a hub name.

    Reads safetensors only and never runs code of the checkpoint. A tokenizer without a padding token pads with its end
    token; the vocabulary stays as it is. Raises ModelError, saying what to do, if the model is missing, the hub cannot be
    reached, the checkpoint is not a causal LM, lacks weights or a tokenizer, or holds pickled weights only.
    """
    name = os.fspath(name_or_path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        name = str(folder)
    elif folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: no such folder; give one with config.json and *.safetensors, or a hub name owner/name")
    if torch.device(device).type == "meta":
        raise ModelError(f"device {device}: it holds no numbers; give one that computes, such as cpu or cuda")
    dtype = _dtype(dtype)
    config = _config(name, revision)
    model = _model(name, revision, config, dtype).to(device).eval()
    check_causal(model)
    tokenizer = load_tokenizer(name, revision=revision)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def located(name: str) -> str:
    """The absolute path of a folder, which leads there from everywhere; any other name as it is."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if name and folder.is_dir() else name


def vocabulary_hash(tokenizer) -> str:
    """SHA-256 (hexadecimal) of all (id, token) pairs of a tokenizer, added tokens included."""
    pairs = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder}: no config.json in this folder; expected a model saved with save_pretrained")
    if any(folder.glob(WEIGHTS)):
        return
    pickles = [path.name for pattern in PICKLES for path in folder.glob(pattern)]
    if pickles:
        raise ModelError(
            f"{folder}: its weights are pickled ({', '.join(sorted(pickles)[:3])}), and loading those could run any code; "
            "convert a checkpoint you trust to safetensors with model.save_pretrained(folder)"
        )
    raise ModelError(f"{folder}: no weights in this folder; expected *.safetensors")


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or dtype == "auto":
        return "auto"
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"dtype {dtype!r}: expected a floating-point type such as float32, bfloat16 or float16")
    return found


def _config(name: str, revision: str | None):
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise ModelError(_unreachable(name, revision, error)) from error
    except (ValueError, KeyError) as error:
        raise ModelError(
            f"{name}: its config.json names an architecture that this transformers does not have ({_first_line(error)}); "
            "models that bring their own code are not loaded"
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name}: a {config.model_type!r} model is not a causal LM; expected a next-token predictor")
    return config


def _model(name: str, revision: str | None, config, dtype: torch.dtype | str) -> nn.Module:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
    except OSError as error:
        if "safetensors" in str(error) and not Path(name).is_dir():
            raise ModelError(
                f"{name}: no safetensors weights on the hub; pickled weights are not loaded, because that could run any code"
            ) from error
        raise ModelError(_unreachable(name, revision, error)) from error
    except SafetensorError as error:
        raise ModelError(
            f"{name}: damaged or truncated weights ({_first_line(error)}); copy the checkpoint again"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{name}: the checkpoint does not fit its config.json ({_first_line(error)})") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{name}: the checkpoint lacks {len(missing)} weights of a causal LM, among them {', '.join(missing[:3])}; "
            "was it saved without its output head?"
        )
    return model


def load_tokenizer(name_or_path: str | Path, *, revision: str | None = None):
    """The tokenizer of a local folder or a hub name; without a padding token it pads with its end token.

    Raises ModelError if there is none, or only files that would run code.
    """
    name = os.fspath(name_or_path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        name = str(folder)
    elif folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: no such folder; give one with tokenizer.json, or a hub name owner/name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # the tokenizer classes raise whatever their missing files lead to
        raise ModelError(
            f"{name}: no usable tokenizer ({_first_line(error)}); save one there with tokenizer.save_pretrained"
        ) from error
    # Without files some classes come up with a vocabulary of special tokens and nothing else.
    if all(index in tokenizer.added_tokens_decoder for index in tokenizer.get_vocab().values()):
        raise ModelError(f"{name}: no tokenizer beside the model; save one there with tokenizer.save_pretrained")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _unreachable(name: str, revision: str | None, error: Exception) -> str:
    at = f" at revision {revision!r}" if revision else ""
    return (
        f"{name}{at}: cannot be loaded ({_first_line(error)}). For a local model give its folder; for one on the hub check "
        "the name, the network and your login, or download it elsewhere (hf download) and set HF_HUB_OFFLINE=1"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
