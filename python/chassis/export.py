"""An adapter at rest: folded into a plain checkpoint, or written as a PEFT LoRA on the output head.

Because the change is affine in the hidden state it folds into the head with nothing left to compute:

    W_U[cols] += (U V)^T        bias[cols] += c - mean U V

A head that holds no bias (most have none) gets the nearest bias-free form, `Adapter.fold_bias`: one more rank.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

from chassis.adapter import Adapter
from chassis.errors import ChassisError
from chassis.files import ensure_writable, write_folder
from chassis.models import Head, vocabulary_hash
from chassis.port import output_head


@torch.no_grad()
def merge(model: torch.nn.Module, adapter: Adapter, tokenizer=None) -> list[str]:
    """Fold `adapter` into the head of `model`, in place; returns notices about what had to change on the way.

    Tied embeddings are untied first. The sum is formed in fp32 and rounded once to the head's dtype. Raises ChassisError
    for an adapter of another base.
    """
    head, notices = output_head(model), []
    adapter.check_base(
        width=head.weight.shape[1],
        vocab_size=head.weight.shape[0],
        vocabulary_hash=vocabulary_hash(tokenizer) if tokenizer is not None else "",
    )
    adapter = adapter.to(head.weight.device)
    if head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
        notices.append("the embeddings were tied to the output head: untied, the checkpoint grows by one head")
    if getattr(head, "bias", None) is None:
        adapter = adapter.fold_bias()
        notices.append("the output head holds no bias: it was folded into the weights (Adapter.fold_bias)")
    else:
        offset = adapter.bias - (adapter.mean @ adapter.U) @ adapter.V
        _add(head.bias, offset, adapter.cols)
    _add(head.weight, adapter.V.T @ adapter.U.T, adapter.cols)
    return notices


def merge_to(model: torch.nn.Module, tokenizer, adapter: Adapter, folder: str | Path) -> list[str]:
    """`merge`, then write a plain checkpoint (safetensors and tokenizer) that any engine can serve.

    The folder appears only when everything in it is on disk. Raises ChassisError if it exists and is not empty.
    """
    folder = Path(folder)
    ensure_writable(folder.parent)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ChassisError(f"{folder} exists and is not empty: choose another folder, or remove it first")
    notices = merge(model, adapter, tokenizer)
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        staging.chmod(0o755)
        os.replace(staging, folder)
    except OSError as error:
        raise ChassisError(f"cannot write {folder}: {error.strerror or error}; nothing was left behind") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return notices


def export_peft(adapter: Adapter, head: Head, folder: str | Path, *, bias: str = "lora") -> list[str]:
    """Write `adapter` as a PEFT LoRA on the output head: adapter_config.json and adapter_model.safetensors.

    `bias="lora"` keeps the bias in PEFT's `lora_bias` (exact; needs peft >= 0.14); `bias="fold"` writes the nearest
    bias-free LoRA of rank r+1, for engines that know no bias. Raises ChassisError for another base or an unknown option.
    """
    if bias not in ("lora", "fold"):
        raise ChassisError(f"bias {bias!r}: expected 'lora' or 'fold'")
    adapter.check_base(width=head.width, vocab_size=head.vocab_size)
    notices = []
    if bias == "fold":
        adapter = adapter.fold_bias()
        notices.append(f"the bias became one more rank: this LoRA has rank {adapter.rank}")
    v, offset = adapter.full_columns()
    offset = offset - (adapter.mean @ adapter.U) @ v
    prefix = f"base_model.model.{head.unembedding_name}"
    tensors = {
        f"{prefix}.lora_A.weight": adapter.U.T.contiguous(),
        f"{prefix}.lora_B.weight": v.T.contiguous(),
    }
    if bias == "lora":
        tensors[f"{prefix}.lora_B.bias"] = offset.contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.config.base,
        "target_modules": [head.unembedding_name],
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "lora_dropout": 0.0,
        "lora_bias": bias == "lora",
        "bias": "none",
        "inference_mode": True,
    }
    write_folder(folder, {"adapter_model.safetensors": tensors, "adapter_config.json": json.dumps(config, indent=2)})
    return notices


def _add(parameter: torch.Tensor, change: torch.Tensor, cols: torch.Tensor | None) -> None:
    """parameter[cols] += change, summed in fp32 (repeated columns too) and rounded once; NaNs are refused."""
    if not torch.isfinite(change).all():
        raise ChassisError("the adapter holds NaN or infinite values: fit it again")
    wide = parameter.float()
    wide = wide + change if cols is None else wide.index_add(0, cols, change)
    parameter.copy_(wide)
