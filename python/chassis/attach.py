"""Plug an adapter into a running model, and take it out again.

A forward hook on the unembedding adds the change to the logits it has just computed, in place, so that everything built
on the model (generate, KV cache, batching, padding, torch.compile) works unchanged. Weights are never touched: `detach`
restores the model bit for bit.
"""

from __future__ import annotations

import torch

from chassis.adapter import Adapter
from chassis.errors import ChassisError
from chassis.models import vocabulary_hash
from chassis_kernels import delta_logits, delta_logits_

_SLOT = "_chassis_attached"


class Attached:
    """A plugged adapter; `detach()` (or leaving the `with` block) unplugs it."""

    def __init__(self, unembedding: torch.nn.Module, adapter: Adapter) -> None:
        self.unembedding, self.adapter = unembedding, adapter
        self._handle = unembedding.register_forward_hook(self._add)
        setattr(unembedding, _SLOT, self)

    def _add(self, module: torch.nn.Module, inputs: tuple, logits: torch.Tensor) -> torch.Tensor:
        hidden = inputs[0]
        if self.adapter.U.device != logits.device:
            self.adapter = self.adapter.to(logits.device)
        adapter = self.adapter
        # Under autograd the logits are saved for backward and must not be written to.
        add = delta_logits if torch.is_grad_enabled() and logits.requires_grad else delta_logits_
        return add(logits, hidden, adapter.U, adapter.V, adapter.bias, mean=adapter.mean, cols=adapter.cols)

    def detach(self) -> None:
        """Restore the model exactly; calling it twice is harmless."""
        self._handle.remove()
        if getattr(self.unembedding, _SLOT, None) is self:
            delattr(self.unembedding, _SLOT)

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *exception) -> None:
        self.detach()


def attach(model: torch.nn.Module, adapter: Adapter, tokenizer=None) -> Attached:
    """Make `model` speak with `adapter` until `.detach()`. Give the tokenizer to have its vocabulary checked too.

    Raises ChassisError when the adapter was fitted for another width or vocabulary, or when one is plugged in already.
    """
    unembedding = output_head(model)
    if getattr(unembedding, _SLOT, None) is not None:
        raise ChassisError("an adapter is attached to this model already: detach it first")
    adapter.check_base(
        width=unembedding.weight.shape[1],
        vocab_size=unembedding.weight.shape[0],
        vocabulary_hash=vocabulary_hash(tokenizer) if tokenizer is not None else "",
    )
    return Attached(unembedding, adapter.to(unembedding.weight.device))


def output_head(model: torch.nn.Module) -> torch.nn.Module:
    """The unembedding of a causal LM; raises ChassisError where there is none with a weight [V, D]."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or getattr(head, "weight", None) is None:
        raise ChassisError(f"{type(model).__name__} has no output embeddings with a weight: give a causal language model")
    return head
