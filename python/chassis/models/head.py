"""Find the parts of a causal language model by running it on a few tokens.

Nothing is read off class names: the unembedding is the module that the model names its output embeddings, the final norm is
the module whose output the unembedding reads, the blocks are the list of modules that ran one after another. Then
`logits = softcap(scale · (h Wᵀ + b))` is checked in numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chassis.errors import ModelError
from chassis.models.forward import (
    check_causal,
    evaluating,
    first_tensor,
    forward,
    hooks,
    name_of,
    probe_ids,
    title,
    unembedding_of,
)

# Names under which configs keep the two; the numbers decide whether and how the model uses them.
SOFTCAP_HINTS = ("final_logit_softcapping", "softcap")
SCALE_HINTS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


@dataclass(frozen=True)
class Head:
    """The output end of a causal LM: `logits = softcap(scale * (final @ weight.T + bias))`; tensors are the model's own."""

    weight: Tensor  # [V, D], in the model's dtype
    bias: Tensor | None  # [V]
    softcap: float | None  # logits = softcap · tanh(logits / softcap)
    scale: float
    unembedding: nn.Module
    unembedding_name: str
    final_norm: nn.Module | None
    final_norm_name: str | None
    blocks: list[nn.Module]
    block_names: list[str]
    tied: bool  # the input embedding is the same tensor as weight

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    def logits_(self, out: Tensor, hidden: Tensor) -> Tensor:
        """`logits` [n, V] of hidden states [n, D], into `out`, which is returned."""
        torch.mm(hidden, self.weight.T, out=out)
        out = out if self.bias is None else out.add_(self.bias)
        out = out if self.scale == 1 else out.mul_(self.scale)
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final hidden states [..., D], in the dtype that `hidden` and the weight share."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def inspect_head(model: nn.Module) -> Head:
    """Find unembedding, final norm and blocks by two forward passes of 2 × 8 tokens and check how the logits are made.

    Raises ModelError if the model has no output head, is not causal, has no single list of blocks, or computes its logits
    in a way other than `softcap(scale * (h Wᵀ + b))`; the message then tells the largest deviation.
    """
    parts = find_parts(model)
    unembedding = unembedding_of(model)
    softcap, scale = _logit_rule(model, unembedding, parts.final, parts.logits)
    embedding = model.get_input_embeddings().weight
    return Head(
        weight=unembedding.weight.detach(),
        bias=None if getattr(unembedding, "bias", None) is None else unembedding.bias.detach(),
        softcap=softcap,
        scale=scale,
        unembedding=unembedding,
        unembedding_name=name_of(model, unembedding),
        final_norm=None if parts.final_norm is None else model.get_submodule(parts.final_norm),
        final_norm_name=parts.final_norm,
        blocks=[model.get_submodule(block) for block in parts.blocks],
        block_names=parts.blocks,
        tied=embedding.data_ptr() == unembedding.weight.data_ptr() and embedding.shape == unembedding.weight.shape,
    )


@dataclass(frozen=True)
class Parts:
    """Names of the modules that matter, and what the unembedding read and the model gave in the forward that found them."""

    final_norm: str | None
    blocks: list[str]
    final: Tensor  # [2, 8, D]
    logits: Tensor  # [2, 8, V]


def find_parts(model: nn.Module) -> Parts:
    """Names of final norm and blocks, whatever the model does with the logits; raises ModelError as `inspect_head` does."""
    unembedding = unembedding_of(model)
    input_ids = probe_ids(model)
    ran: list[tuple[nn.Module, object]] = []
    read: list[Tensor] = []
    check_causal(model)
    with hooks() as handles, torch.no_grad(), evaluating(model):
        for module in model.modules():
            handles.append(module.register_forward_hook(lambda module, args, output: ran.append((module, output))))
        handles.append(unembedding.register_forward_pre_hook(lambda module, args: read.append(first_tensor(args))))
        logits = forward(model, input_ids, torch.ones_like(input_ids)).logits
    if len(read) != 1:
        name = name_of(model, unembedding)
        raise ModelError(f"{title(model)}: its output embeddings {name!r} ran {len(read)} times in a forward, expected once")
    names = {id(module): name for name, module in model.named_modules()}
    blocks = _blocks(model, [module for module, _ in ran])
    norm = _final_norm(ran, read[0], blocks)
    norm_name = None if norm is None else names[id(norm)]
    return Parts(norm_name, [names[id(block)] for block in blocks], read[0], logits)


def _blocks(model: nn.Module, ran: list[nn.Module]) -> list[nn.Module]:
    """The outermost list of modules that all ran once and in order; of several, the one as long as the config says."""
    position: dict[int, int] = {}
    times: dict[int, int] = {}
    for index, module in enumerate(ran):
        position[id(module)] = index
        times[id(module)] = times.get(id(module), 0) + 1
    lists: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        entries = list(module) if isinstance(module, nn.ModuleList) else []
        order = [position.get(id(entry), -1) for entry in entries]
        once = all(times.get(id(entry)) == 1 for entry in entries)
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if entries and once and order == sorted(order) and not inside:
            lists[name] = entries
    config = getattr(model, "config", None)
    expected = getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "num_hidden_layers", None)
    matching = [entries for entries in lists.values() if len(entries) == expected] or list(lists.values())
    if len(matching) != 1:
        found = {name: len(entries) for name, entries in lists.items()}
        raise ModelError(f"{title(model)}: expected one list of {expected} blocks run in order, found {found or 'none'}")
    return matching[0]


def _final_norm(ran: list[tuple[nn.Module, object]], final: Tensor, blocks: list[nn.Module]) -> nn.Module | None:
    """The module outside the blocks that first gave out what the unembedding reads, if its parameters are vectors."""
    within = {id(inner) for block in blocks for inner in block.modules()}
    for module, output in ran:
        if isinstance(output, Tensor) and output.shape == final.shape and output.to(final).equal(final):
            is_norm = id(module) not in within and all(p.ndim <= 1 for p in module.parameters())
            return module if is_norm else None
    return None


def _logit_rule(model: nn.Module, unembedding: nn.Module, final: Tensor, logits: Tensor) -> tuple[float | None, float]:
    """(softcap, scale) from the config's hints, or the scale measured, whichever reproduces the logits."""
    config = model.config.get_text_config()
    softcap = next((c for key in SOFTCAP_HINTS if (c := getattr(config, key, None))), None)
    bias = getattr(unembedding, "bias", None)
    plain = nn.functional.linear(final.float(), unembedding.weight.float(), None if bias is None else bias.float())
    given = logits.float()
    if plain.shape != given.shape:
        raise ModelError(f"{title(model)}: logits {list(given.shape)} but h Wᵀ {list(plain.shape)}: expected the same")
    if not torch.isfinite(given).all():
        raise ModelError(
            f"{title(model)}: its logits are NaN or infinite; are its weights damaged, or too large for its dtype?"
        )
    hints = [float(h) for key in SCALE_HINTS if isinstance(h := getattr(config, key, None), int | float) and h]
    flat = given if softcap is None else softcap * torch.atanh((given / softcap).clamp(-1 + 1e-6, 1 - 1e-6))
    measured = ((flat * plain).sum() / (plain * plain).sum().clamp_min(1e-30)).item()
    allowed = given.abs().max().item() * max(1e-3, 8 * torch.finfo(final.dtype).eps)
    least = float("inf")
    for scale in (1.0, *hints, *(1 / hint for hint in hints), measured):
        made = plain * scale
        made = made if softcap is None else softcap * torch.tanh(made / softcap)
        least = min(least, deviation := (made - given).abs().max().item())
        if deviation <= allowed:
            return softcap, scale
    raise ModelError(
        f"{title(model)}: its logits are not softcap(scale * (h Wᵀ + b)): the largest deviation is {least:.3g}, "
        f"allowed {allowed:.3g} (softcap {softcap}, scale {measured:.4g}); models with such a head cannot be used"
    )
