"""Hidden states of a causal language model in one forward pass that stops before the unembedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from chassis.errors import ModelError
from chassis.models.forward import first_tensor, forward, hooks, title, unembedding_of
from chassis.models.head import find_parts


@dataclass(frozen=True)
class Captured:
    """Hidden states of one forward pass, in the model's dtype; rows at padded positions mean nothing."""

    final: Tensor  # [B, T, D], input of the unembedding
    layers: dict[int, Tensor]  # l -> [B, T, D]: 0 enters the first block, l leaves block l-1
    pre_norm: Tensor | None  # [B, T, D], input of the final norm


@torch.no_grad()
def capture(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layers: Sequence[int] = (),
    pre_norm: bool = False,
) -> Captured:
    """Hidden states of input_ids [B, T] int64 under attention_mask [B, T] (1 token, 0 padding) in one forward, no logits.

    `layers` are residual states by number: 0 is the input of the first block, l the output of block l-1, so that the
    number of blocks names the last state before the final norm. Positions are counted from the mask: the side of the
    padding does not change a row. Raises ModelError for a layer that does not exist or shapes that do not match.
    """
    names = _names(model)
    n_layers = len(names.blocks)
    if wrong := [layer for layer in layers if not 0 <= layer <= n_layers]:
        raise ModelError(f"{title(model)} has {n_layers} blocks: layers run from 0 to {n_layers}, got {wrong}")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if input_ids.ndim != 2 or attention_mask.shape != input_ids.shape:
        raise ModelError(
            f"input_ids {list(input_ids.shape)} and attention_mask {list(attention_mask.shape)}: expected the same [B, T]"
        )
    found: dict[int | str, Tensor] = {}
    with hooks() as handles:
        for layer in set(layers):
            block = model.get_submodule(names.blocks[max(layer - 1, 0)])
            if layer == 0:
                handles.append(block.register_forward_pre_hook(_keep_input(found, 0), with_kwargs=True))
            else:
                handles.append(block.register_forward_hook(_keep_output(found, layer)))
        if pre_norm and names.final_norm is None:
            handles.append(model.get_submodule(names.blocks[-1]).register_forward_hook(_keep_output(found, "pre_norm")))
        elif pre_norm:
            norm = model.get_submodule(names.final_norm)
            handles.append(norm.register_forward_pre_hook(_keep_input(found, "pre_norm"), with_kwargs=True))
        found["final"] = final_states(model, lambda: forward(model, input_ids, attention_mask))
    return Captured(found["final"], {layer: found[layer] for layer in layers}, found.get("pre_norm"))


def final_states(model: nn.Module, run: Callable[[], object]) -> Tensor:
    """What the unembedding of `model` would read, [B, T, D], in the forward pass that `run` starts and that ends there."""
    found: dict[str, Tensor] = {}
    unembedding = unembedding_of(model)
    with hooks() as handles:
        # First in line, so that nothing attached to the unembedding runs.
        handles.append(unembedding.register_forward_pre_hook(_stop(found), prepend=True, with_kwargs=True))
        try:
            run()
        except _Stop:
            pass
    return found["final"]


class _Stop(Exception):
    """Ends a forward pass before the unembedding."""


@dataclass(frozen=True)
class _Names:
    final_norm: str | None
    blocks: list[str]


_NAMES: WeakKeyDictionary[nn.Module, _Names] = WeakKeyDictionary()


def _names(model: nn.Module) -> _Names:
    if model not in _NAMES:
        parts = find_parts(model)
        _NAMES[model] = _Names(parts.final_norm, parts.blocks)
    return _NAMES[model]


def _keep_input(found: dict, key: int | str):
    def hook(module, args, kwargs):
        found[key] = first_tensor(args[0] if args else next(iter(kwargs.values())))

    return hook


def _keep_output(found: dict, key: int | str):
    def hook(module, args, output):
        found[key] = first_tensor(output)

    return hook


def _stop(found: dict):
    keep = _keep_input(found, "final")

    def hook(module, args, kwargs):
        keep(module, args, kwargs)
        raise _Stop

    return hook
