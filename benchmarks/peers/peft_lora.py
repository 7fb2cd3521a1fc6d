"""peft's LoRA layer on the output head, not merged: what `get_peft_model` puts in the head's place."""

from __future__ import annotations

import torch

from benchmarks.cases import Case, Provider

NAME, MODULE, OPS = "peft", "peft", ("port",)


def provide(case: Case, device: str) -> Provider | str:
    """The layer's own forward with one adapter."""
    if case.shape["A"] > 1:
        return "takes one adapter for a whole batch in its layer"
    return Provider(_layer, of=lambda full: full[:1])


def _layer(hidden, weight, U, W, c, ids):
    import peft

    from benchmarks.ops.port import Head

    rank = U.shape[-1]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["head"], lora_bias=True, inference_mode=True)
    layer = peft.inject_adapter_in_model(config, Head(weight)).get_output_embeddings()
    for part, values in ((layer.lora_A, U[0].T), (layer.lora_B, W[0].T)):
        part["default"].weight = torch.nn.Parameter(values.contiguous(), requires_grad=False)
    layer.lora_B["default"].bias = torch.nn.Parameter(c[0], requires_grad=False)
    layer.eval()

    def step():
        with torch.no_grad():
            return layer(hidden)

    return step
