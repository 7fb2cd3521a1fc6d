"""The expert's logits at the states of a plan, in one forward pass over its tree.

Tokens of the tree stand in one sequence; each attends to the tokens on its own path alone and counts its position along it.
The keys and values of the pass are kept, so that further states can be added below any of them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from chassis.bridge.tree import Tree
from chassis.errors import ModelError
from chassis.models.forward import first_tensor, hooks, title, unembedding_of

AT_ONCE = 512  # states of one forward pass


class ExpertStates:
    """`grow(tokens, parent)` adds states and returns the logits [n, V] of what follows each."""

    def __init__(self, model: nn.Module, start: int) -> None:
        self.model, self.start = model, start
        self.device, self.dtype = (model.get_input_embeddings().weight.device, model.get_input_embeddings().weight.dtype)
        self.cache = DynamicCache(config=model.config)
        self.on_path = torch.zeros(0, 0, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.on_path)

    @torch.no_grad()
    def grow(self, tokens: np.ndarray, parent: np.ndarray) -> Tensor:
        """States after `tokens` [n] below the states `parent` [n], numbered on from len(self); -1 as a parent: the first.

        Raises ModelError for models that do not take a mask of which token attends to which.
        """
        parts = [self._grow(tokens[i : i + AT_ONCE], parent[i : i + AT_ONCE]) for i in range(0, len(tokens), AT_ONCE)]
        return torch.cat(parts)

    def _grow(self, tokens: np.ndarray, parent: np.ndarray) -> Tensor:
        old, n = len(self.on_path), len(tokens)
        on_path = torch.zeros(old + n, old + n, dtype=torch.bool)
        on_path[:old, :old] = self.on_path
        on_path[old:] = _ancestors(self.on_path, torch.from_numpy(parent))
        attends = on_path[old:].to(self.device)
        mask = torch.zeros(attends.shape, dtype=self.dtype, device=self.device)
        mask.masked_fill_(~attends, torch.finfo(self.dtype).min)
        ids = torch.from_numpy(np.where(tokens >= 0, tokens, self.start))[None].to(self.device)
        logits = masked(self.model, ids, mask[None, None], attends.sum(1)[None] - 1, self.cache).logits[0]
        self.on_path = on_path
        return logits


def _ancestors(known: Tensor, parent: Tensor) -> Tensor:
    """Which states each of the next has on its path, itself included: [n, len(known) + n]; `parent` [n], -1 for none."""
    old, n = len(known), len(parent)
    found = torch.zeros(n + 1, old + n, dtype=torch.bool)  # the last row: nothing
    found[:n, old:].fill_diagonal_(True)
    below = (parent >= 0) & (parent < old)
    found[:n][below, :old] = known[parent[below]]
    above = torch.where(parent < old, n, parent - old)
    while (above < n).any():  # the paths known double in length
        found[:n] |= found[above]
        above = torch.cat([above, above.new_tensor([n])])[above]
    return found[:n]


def tree_logits(model: nn.Module, tree: Tree, start: int) -> Tensor:
    """Logits [n_nodes, V] of the next token after each node; `start` is the token that opens a text for this model."""
    return ExpertStates(model, start).grow(tree.tokens, tree.parent)


def tree_states(model: nn.Module, tree: Tree, start: int) -> tuple[Tensor, Tensor]:
    """`tree_logits`, and the final states [n_nodes, D] that the unembedding read."""
    read: list[Tensor] = []
    unembedding = unembedding_of(model)
    with hooks() as handles:
        handles.append(unembedding.register_forward_pre_hook(lambda _, args: read.append(first_tensor(args)[0])))
        logits = tree_logits(model, tree, start)
    return logits, torch.cat(read)


def masked(model: nn.Module, ids: Tensor, mask: Tensor, position: Tensor, cache: DynamicCache):
    """A forward pass over tokens [B, n] that attend as `mask` [B, 1, n, old + n] says, `old` of them in the cache."""
    inputs = {"attention_mask": mask, "position_ids": position, "past_key_values": cache, "use_cache": True}
    try:
        return model(input_ids=ids, **inputs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{title(model)} takes no mask of which token attends to which ({error})") from error
