"""A model over the tokens of several texts as one row without padding; further tokens may branch off any of them.

Attention alone has to know which text a token belongs to, and it alone is replaced while the model runs: there the texts
are laid out in rows of their own, padded to the longest. `packs` asks whether that is the attention that the model has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from chassis.models import final_states
from chassis.models.forward import evaluating, forward, probe_ids

OWN, PACKED = "sdpa", "chassis_packed"  # names of attention functions


class PackedStates:
    """`run` gives what the model's unembedding would read after each token; `n_texts` of at most `longest` tokens each."""

    def __init__(self, model: nn.Module, n_texts: int, longest: int) -> None:
        self.model, self.n_texts, self.longest = model, n_texts, longest
        self.device = model.get_input_embeddings().weight.device
        self._count = torch.zeros(n_texts, dtype=torch.int64)  # tokens of each text so far
        self._positions = torch.zeros(n_texts, longest, dtype=torch.int64, device=self.device)
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values [texts, longest, heads, width] of each layer

    @torch.no_grad()
    def run(self, ids: Tensor, positions: Tensor, sizes: Tensor, attends: Tensor | None = None) -> Tensor:
        """States [n, D] of the tokens `ids` [n] at `positions` [n], `sizes` [texts] of each text, one text after the other.

        `attends` [n, m] bool: to which tokens of its text, in the order they came in, its own pass included, each attends;
        None, in a first pass: to itself and all before it.
        """
        text = torch.repeat_interleave(sizes)
        place = torch.arange(len(ids)) - (sizes.cumsum(0) - sizes)[text]
        self._most = int(sizes.max())  # queries of a text
        self._query = (text * self._most + place).to(self.device)
        self._slot = (text * self.longest + self._count[text] + place).to(self.device)
        self._count = self._count + sizes
        self._attends = None if attends is None else attends.to(self.device)
        ids, positions = ids.to(self.device), positions.to(self.device)
        self._positions.view(-1)[self._slot] = positions
        self._at = positions
        self._masks: dict[int | None, Tensor | None] = {}
        config = self.model.config
        own, config._attn_implementation = config._attn_implementation, PACKED
        inputs = {"input_ids": ids[None], "position_ids": positions[None], "use_cache": False, "packed": self}
        try:
            return final_states(self.model, lambda: self.model(**inputs))[0]
        finally:
            config._attn_implementation = own

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options) -> tuple[Tensor, None]:
        """Attention [1, n, heads, width] of one layer; query, key and value [1, heads, n, width]. Raises ValueError for
        attention that does more than these say."""
        for name in ("softcap", "position_bias"):
            if options.get(name) is not None:
                raise ValueError(f"attention with a {name} is not read packed")
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        if module.layer_idx not in self._stored:
            # Zeros, since what is masked counts nothing, but must be a number.
            stored = tuple(x.new_zeros(self.n_texts * self.longest, *x.shape[1:]) for x in (key, value))
            self._stored[module.layer_idx] = stored
        queries = query.new_empty(self.n_texts * self._most, *query.shape[1:]).index_copy_(0, self._query, query)
        rows = [queries.unflatten(0, (self.n_texts, -1))]
        for stored, new in zip(self._stored[module.layer_idx], (key, value), strict=True):
            stored.index_copy_(0, self._slot, new)
            rows.append(stored.unflatten(0, (self.n_texts, -1))[:, : int(self._count.max())])
        mask = self._mask(options.get("sliding_window"), query.dtype)
        found = nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in rows),
            attn_mask=mask,
            is_causal=mask is None,
            scale=options.get("scaling"),
            enable_gqa=True,
        )
        return found.transpose(1, 2).flatten(0, 1).index_select(0, self._query)[None], None

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """0 where a token attends, to no more than `window` positions, [texts, 1, queries, tokens so far]."""
        if window not in self._masks:
            width, attends = int(self._count.max()), self._attends
            if window is not None and window <= int(self._at.max()):
                if attends is None:
                    place = self._slot % self.longest
                    attends = torch.arange(width, device=self.device) <= place[:, None]
                attends = attends & (self._at[:, None] - self._positions[self._slot // self.longest, :width] < window)
            mask = None
            if attends is not None:
                least = torch.finfo(dtype).min
                mask = torch.full((self.n_texts * self._most, width), least, dtype=dtype, device=self.device)
                mask[self._query] = torch.where(attends, 0.0, least).to(dtype)
                mask = mask.view(self.n_texts, 1, self._most, width)
            self._masks[window] = mask
        return self._masks[window]


def _packed_attention(module, query, key, value, attention_mask, *, packed: PackedStates, **options):
    return packed.attend(module, query, key, value, **options)


AttentionInterface.register(PACKED, _packed_attention)


@torch.no_grad()
def packs(model: nn.Module) -> bool:
    """Whether the states of `model` are the same in a row with others: asked with a text of which the second half branches.

    A model must take its attention from transformers' interface, by the name OWN, and mix tokens nowhere else.
    """
    if getattr(model.config, "_attn_implementation", None) != OWN:
        return False
    ids = probe_ids(model)
    length = ids.shape[1]
    half, place = length // 2, torch.arange(length)
    attends = torch.ones(length, length + half, dtype=torch.bool).tril(half)
    attends[:, half:length] = False
    with evaluating(model):
        own = final_states(model, lambda: forward(model, ids, torch.ones_like(ids))).float()
        try:
            states = PackedStates(model, 1, length + half)
            trunk = states.run(ids[0], place, torch.tensor([length]))
            branch = states.run(ids[1, half:], place[half:], torch.tensor([half]), attends[half:])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            return False
    found, own = torch.cat([trunk, branch]).float(), torch.cat([own[0], own[1, half:]])
    return bool((found - own).abs().max() <= own.abs().max() * max(1e-4, 16 * torch.finfo(model.dtype).eps))
