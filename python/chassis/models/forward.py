"""One forward pass of a causal LM: inputs made so that padding is irrelevant, hooks that are always removed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from chassis.errors import ModelError


def title(model: nn.Module) -> str:
    return getattr(model, "name_or_path", "") or type(model).__name__


def unembedding_of(model: nn.Module) -> nn.Module:
    unembedding = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if unembedding is None:
        raise ModelError(f"{title(model)} has no output head: expected a causal LM, loaded with its unembedding")
    weight = getattr(unembedding, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise ModelError(f"{title(model)}: no floating-point unembedding [V, D]; load the model without quantisation")
    return unembedding


def name_of(model: nn.Module, part: nn.Module) -> str:
    """The name that `model` has for a module of its own."""
    return next(name for name, module in model.named_modules() if module is part)


def forward(model: nn.Module, input_ids: Tensor, attention_mask: Tensor):
    device = model.get_input_embeddings().weight.device
    mask = attention_mask.to(device, torch.long)
    inputs = {"input_ids": input_ids.to(device), "attention_mask": mask, "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    return model(**inputs)


@contextmanager
def hooks() -> Iterator[list]:
    handles: list = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(value: object) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def probe_ids(model: nn.Module) -> Tensor:
    """Two rows [2, 8] of tokens that agree in the first half only."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    return torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 9, 10, 11, 12]]) % vocab_size


@torch.no_grad()
def check_causal(model: nn.Module) -> None:
    """Raise ModelError unless the logits of the first tokens are the same whatever tokens follow."""
    input_ids = probe_ids(model)
    with evaluating(model):
        one, other = forward(model, input_ids, torch.ones_like(input_ids)).logits[:, :4].float()
    allowed = one.abs().max().item() * max(1e-5, 4 * torch.finfo(next(model.parameters()).dtype).eps)
    if (one - other).abs().max().item() > allowed:
        raise ModelError(f"{title(model)} is not a causal LM: what it predicts for a token depends on the tokens after it")
