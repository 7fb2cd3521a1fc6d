"""The bias of an adapter where an engine's output head or LoRA cannot hold it: a file, and a static LogitsProcessor.

    model.generate(..., logits_processor=[LogitBias.load("merged")])

The processor adds one vector [V] to the scores of every step, which is exact for greedy decoding and sampling. Beam search
compares normalised scores: give it `renormalize_logits=True`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import LogitsProcessor

from chassis.adapter import Adapter
from chassis.errors import ChassisError
from chassis.files import write_file

FILE = "logit_bias/bias.safetensors"  # in a folder of its own: engines take every *.safetensors beside it for weights


class LogitBias(LogitsProcessor):
    """Adds `bias` [V] to the scores."""

    def __init__(self, bias: torch.Tensor) -> None:
        self.bias = bias

    @classmethod
    def load(cls, folder: str | Path) -> LogitBias:
        """That of a merged checkpoint or LoRA written with its bias beside it; ChassisError where there is none."""
        try:
            return cls(load_file(Path(folder) / FILE)["bias"])
        except (OSError, SafetensorError, KeyError) as error:
            raise ChassisError(f"{folder} holds no readable {FILE} ({error}): merge or export with bias 'side'") from error

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.bias.shape[-1] != scores.shape[-1]:
            raise ChassisError(f"a bias of {self.bias.shape[-1]} tokens for logits of {scores.shape[-1]}: another model's")
        self.bias = self.bias.to(scores.device)
        return scores + self.bias


def write_bias(adapter: Adapter, folder: str | Path, *, scale: float = 1.0, softcap: float | None = None) -> Path:
    """Write what the adapter adds to the logits whatever the hidden state, [V] fp32, times the head's `scale`.

    Raises ChassisError for a head that caps its logits: a bias behind the cap is another one.
    """
    if softcap:
        raise ChassisError(f"this head caps its logits at {softcap:g} after the bias: fold the bias, or attach the adapter")
    _, bias = adapter.in_vocabulary(adapter.V, adapter.offset)
    return write_file(Path(folder) / FILE, {"bias": (bias * scale).contiguous().cpu()})
