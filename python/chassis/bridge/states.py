"""The expert's logits at the states of a plan, in one forward pass over its tree.

Tokens of the tree stand in one sequence; each attends to the tokens on its own path alone and counts its position along it.
The keys and values of the pass are kept, so that further states can be added below any of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from chassis.bridge.plan import Tree
from chassis.errors import ModelError
from chassis.models.forward import title

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
        logits = _masked(self.model, ids, mask[None, None], attends.sum(1)[None] - 1, self.cache)[0]
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


@torch.no_grad()
def trees_logits(model: nn.Module, trees: Sequence[Tree], start: int) -> Tensor:
    """`tree_logits` of several trees, one after the other: all trunks as plain texts in one pass, then all their branches.

    Raises ModelError for models that do not take a mask of which token attends to which.
    """
    if max(map(len, trees)) > AT_ONCE:
        return torch.cat([tree_logits(model, tree, start) for tree in trees])
    weight = model.get_input_embeddings().weight
    cache, trunks = DynamicCache(config=model.config), [tree.n_trunk + 1 for tree in trees]
    ids = _padded([np.where(tree.tokens >= 0, tree.tokens, start)[:n] for tree, n in zip(trees, trunks, strict=True)])
    logits = model(input_ids=ids.to(weight.device), past_key_values=cache, use_cache=True).logits
    found = [logits[i, :n] for i, n in enumerate(trunks)]
    branches = [len(tree) - n for tree, n in zip(trees, trunks, strict=True)]
    if any(branches):
        old, new = ids.shape[1], max(branches)
        ids, position = (
            _padded([getattr(tree, name)[n:] for tree, n in zip(trees, trunks, strict=True)]) for name in ("tokens", "depth")
        )
        attends = torch.zeros(len(trees), 1, new, old + new, dtype=torch.bool)
        for row, tree, n, more in zip(attends[:, 0], trees, trunks, branches, strict=True):
            on_path = _ancestors(torch.ones(n, n, dtype=torch.bool).tril(), torch.from_numpy(tree.parent[n:]))
            row[:more, :n], row[:more, old : old + more] = on_path[:, :n], on_path[:, n:]
        mask = torch.zeros(attends.shape, dtype=weight.dtype).masked_fill_(~attends, torch.finfo(weight.dtype).min)
        logits = _masked(model, ids.to(weight.device), mask.to(weight.device), position.to(weight.device), cache)
        found = [torch.cat([trunk, logits[i, :n]]) for i, (trunk, n) in enumerate(zip(found, branches, strict=True))]
    return torch.cat(found)


def _masked(model: nn.Module, ids: Tensor, mask: Tensor, position: Tensor, cache: DynamicCache) -> Tensor:
    """Logits [B, n, V] of tokens that attend as `mask` [B, 1, n, old + n] says, `old` of them in the cache."""
    inputs = {"attention_mask": mask, "position_ids": position, "past_key_values": cache, "use_cache": True}
    try:
        return model(input_ids=ids, **inputs).logits
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{title(model)} takes no mask of which token attends to which ({error})") from error


def _padded(rows: Sequence[np.ndarray]) -> Tensor:
    """Rows of different lengths as one matrix [B, longest] int64, zeros behind their ends."""
    return nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)
