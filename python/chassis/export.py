"""An adapter in PEFT's format, both ways: a LoRA on the output head, adapter_config.json and adapter_model.safetensors.

lora_A [r, D] = U^T    lora_B [V, r] = V^T    scaling lora_alpha / r = 1
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from chassis.adapter import Adapter, AdapterConfig
from chassis.bias import write_bias
from chassis.errors import ChassisError
from chassis.files import write_folder
from chassis.models import Head

BIASES = ("lora", "fold", "side")
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank can be
REFUSED = {
    "use_dora": "DoRA",
    "rank_pattern": "ranks by module",
    "alpha_pattern": "alphas by module",
    "use_qalora": "QALoRA",
}


def export_peft(adapter: Adapter, head: Head, folder: str | Path, *, bias: str = "lora", pad: bool = False) -> list[str]:
    """Write `adapter` as a PEFT LoRA on the output head; returns notices.

    `bias="lora"` keeps the bias in PEFT's `lora_bias` (exact; needs peft >= 0.14); for engines that know no such bias
    `"fold"` writes the nearest LoRA of rank r+1 without one, and `"side"` keeps it exactly, in a file for
    `chassis.bias.LogitBias`. `pad` fills the rank up with zeros to the next of SERVED_RANKS.
    Raises ChassisError for another base, an unknown option, or a rank to be padded that no engine serves.
    """
    if bias not in BIASES:
        raise ChassisError(f"bias {bias!r}: expected one of {', '.join(map(repr, BIASES))}")
    adapter.check_base(width=head.width, vocab_size=head.vocab_size)
    adapter.check_finite()
    notices = []
    if bias == "fold":
        adapter = adapter.fold_bias()
        notices.append(f"the bias became one more rank: this LoRA has rank {adapter.rank}")
    v, offset = adapter.in_vocabulary(adapter.V, adapter.offset)
    down, up, rank = adapter.U.T, v.T, served_rank(adapter.rank) if pad else adapter.rank
    more = rank - adapter.rank
    if rank not in SERVED_RANKS:
        notices.append(_advice(rank))
    prefix = f"base_model.model.{head.unembedding_name}"
    tensors = {
        f"{prefix}.lora_A.weight": torch.nn.functional.pad(down, (0, 0, 0, more)).contiguous(),
        f"{prefix}.lora_B.weight": torch.nn.functional.pad(up, (0, more)).contiguous(),
    }
    if bias == "lora":
        tensors[f"{prefix}.lora_B.bias"] = offset.contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.config.base,
        "target_modules": [head.unembedding_name],
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "lora_bias": bias == "lora",
        "bias": "none",
        "inference_mode": True,
    }
    write_folder(folder, {"adapter_model.safetensors": tensors, "adapter_config.json": json.dumps(config, indent=2)})
    if bias == "side":
        write_bias(adapter, folder, scale=head.scale, softcap=head.softcap)
        notices.append("the bias lies beside the LoRA, for chassis.bias.LogitBias")
    return notices


def import_peft(folder: str | Path, head: Head, *, base: str = "", vocabulary_hash: str = "") -> Adapter:
    """The adapter in a PEFT LoRA folder whose only target is the output head of this base.

    `base`, what the model is called, and `vocabulary_hash` go into its config. Such an adapter does not say which direction
    is constant: its bias, if it has one, cannot be folded. Raises ChassisError for other targets and kinds of LoRA, naming
    them, and other shapes.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ChassisError(
            f"{folder} holds no readable LoRA ({error}): expected what peft's save_pretrained writes"
        ) from error
    kinds = [kind for key, kind in REFUSED.items() if config.get(key)]
    if config.get("peft_type") != "LORA" or kinds:
        given = ", ".join(kinds) or config.get("peft_type")
        raise ChassisError(f"{folder}: {given} is not a plain LoRA on the output head, and only that is an adapter")
    name = f"base_model.model.{head.unembedding_name}"
    others = sorted({key.rpartition(".lora_")[0] for key in tensors if ".lora_" in key} - {name})
    if others or f"{name}.lora_A.weight" not in tensors:
        found = ", ".join(other.removeprefix("base_model.model.") for other in others[:3]) or "nothing"
        raise ChassisError(f"{folder} changes {found}: only a LoRA on {head.unembedding_name!r} alone is an adapter")
    down, up = (tensors[f"{name}.lora_{side}.weight"].float() for side in "AB")
    scaling = config["lora_alpha"] / (math.sqrt(len(down)) if config.get("use_rslora") else len(down))
    bias = tensors.get(f"{name}.lora_B.bias")
    zeros = torch.zeros(down.shape[1])
    if (len(up), down.shape[1]) != (head.vocab_size, head.width):
        raise ChassisError(
            f"{folder} is for an output head [{len(up)}, {down.shape[1]}], and {base or 'this base'} has "
            f"[{head.vocab_size}, {head.width}]: give the base it was trained on"
        )
    adapter = Adapter(
        U=down.T.contiguous(),
        V=(scaling * up.T).contiguous(),
        bias=torch.zeros(len(up)) if bias is None else scaling * bias.float(),
        mean=zeros,
        constant=zeros.clone(),
        config=AdapterConfig(base=base or config.get("base_model_name_or_path") or "", vocabulary_hash=vocabulary_hash),
    )
    adapter.check_finite()
    return adapter


def served_rank(rank: int) -> int:
    """The smallest of SERVED_RANKS that holds `rank`; raises ChassisError above the largest."""
    larger = [served for served in SERVED_RANKS if served >= rank]
    if not larger:
        raise ChassisError(_advice(rank))
    return larger[0]


def _advice(rank: int) -> str:
    if rank > SERVED_RANKS[-1]:
        return f"rank {rank}: serving engines take at most {SERVED_RANKS[-1]}; fit or truncate to less, or merge"
    return f"rank {rank}: start vLLM with --max-lora-rank {served_rank(rank)}, or pad to that (its limits: {SERVED_RANKS})"
