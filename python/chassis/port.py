"""Many experts plugged into one base, and which of them speaks on each row of a batch.

A forward hook on the unembedding adds each row's change to the logits it has just computed, in place and in one call, so
that everything built on the model (generate, KV cache, batching, padding, beams, torch.compile) works unchanged. Weights
are never touched: rows routed to "base" keep every bit, and `detach` restores the model.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from chassis.adapter import Adapter, combine
from chassis.errors import ChassisError
from chassis.models import vocabulary_hash
from chassis_kernels import delta_logits, delta_logits_, stack_adapters

BASE = "base"  # the route of rows that no adapter touches
Route = str | Mapping[str, float]  # a name, or weights of a linear composition
_SLOT = "_chassis_port"


class Port:
    """Adapters by name on one base model; `detach()`, or leaving the `with` block, restores the model.

    Give the tokenizer to have its vocabulary checked too. Adapters can be plugged, replaced, unplugged and routed at any
    time, also between two steps of a running `generate`: a step sees either the old route or the new one.
    """

    def __init__(self, model: torch.nn.Module, tokenizer=None) -> None:
        self.unembedding = output_head(model)
        if getattr(self.unembedding, _SLOT, None) is not None:
            raise ChassisError("adapters are attached to this model already: detach that port, or plug into it")
        self.vocabulary_hash = vocabulary_hash(tokenizer) if tokenizer is not None else ""
        self.adapters: dict[str, Adapter] = {}
        self._routes: list[Route] = [BASE]
        self._plan: _Plan | None = None
        self._handle = self.unembedding.register_forward_hook(self._add)
        setattr(self.unembedding, _SLOT, self)

    def plug(self, name: str, adapter: Adapter) -> Port:
        """Make `adapter` known as `name`, in place of the one of that name; nothing speaks with it until it is routed.

        Raises ChassisError for an adapter of another width or vocabulary, or one that holds NaN or infinite values.
        """
        if not name or name in (BASE, "auto") or set(name) & set("=,"):
            raise ChassisError(f"adapter name {name!r}: expected some text without '=' and ',', and not 'base' or 'auto'")
        vocab_size, width = self.unembedding.weight.shape
        adapter.check_base(width=width, vocab_size=vocab_size, vocabulary_hash=self.vocabulary_hash)
        adapter.check_finite()
        adapters = self.adapters | {name: adapter}
        plan = _plan(self._routes, adapters)
        self.adapters, self._plan = adapters, plan
        return self

    def unplug(self, name: str) -> Adapter:
        """Forget `name` and return its adapter; raises ChassisError if it is not plugged, or routed."""
        self._known(name)
        if any(name in _weights(route) for route in self._routes):
            raise ChassisError(f"the adapter {name!r} is routed: route elsewhere first, to {BASE!r} for instance")
        return self.adapters.pop(name)

    def route(self, route: Route | Sequence[Route] | Callable[[str], Route], prompts: Sequence[str] | None = None) -> Port:
        """Say who speaks from here on.

        `route`: a name; "base"; weights such as {"code": 0.7, "docs": 0.3}, which add up the changes; a list with one of
        these for each request of the batch; or a function that is given each of `prompts` and returns one of these. A
        request may have several rows (beams, samples) if they follow each other, as `generate` lays them out.
        Raises ChassisError for a name that is not plugged.
        """
        if callable(route):
            if prompts is None:
                raise ChassisError("a function routes by prompt: give the prompts too")
            route = [route(prompt) for prompt in prompts]
        routes = [route] if isinstance(route, str | Mapping) else list(route)
        if not routes:
            raise ChassisError("no routes: give one for each request of the batch")
        for name in (name for each in routes for name in _weights(each)):
            if name != BASE:
                self._known(name)
        plan = _plan(routes, self.adapters)
        self._routes, self._plan = routes, plan
        return self

    def detach(self) -> None:
        """Restore the model exactly; calling it twice is harmless."""
        self._handle.remove()
        if getattr(self.unembedding, _SLOT, None) is self:
            delattr(self.unembedding, _SLOT)

    def __enter__(self) -> Port:
        return self

    def __exit__(self, *exception) -> None:
        self.detach()

    def _known(self, name: str) -> None:
        if name not in self.adapters:
            near = difflib.get_close_matches(name, self.adapters, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            plugged = ", ".join(self.adapters) or "none"
            raise ChassisError(f"no adapter {name!r} is plugged: {hint}plugged: {plugged}")

    def _add(self, module: torch.nn.Module, inputs: tuple, logits: Tensor) -> Tensor | None:
        plan = self._plan
        if plan is None:
            return None
        if plan.U.device != logits.device:
            moved = plan.to(logits.device)
            self._plan = moved if self._plan is plan else self._plan
            plan = moved
        ids = None if plan.ids is None else _rows(plan.ids, logits)
        # Under autograd the logits are saved for backward and must not be written to.
        add = delta_logits if torch.is_grad_enabled() and logits.requires_grad else delta_logits_
        return add(logits, inputs[0], plan.U, plan.V, plan.bias, mean=plan.mean, cols=plan.cols, adapter_id=ids)


def attach(model: torch.nn.Module, adapter: Adapter, tokenizer=None) -> Port:
    """A port with one adapter, on all rows, until `.detach()`; raises ChassisError as `Port` and `plug` do."""
    port = Port(model, tokenizer)
    try:
        return port.plug("adapter", adapter).route("adapter")
    except ChassisError:
        port.detach()
        raise


def output_head(model: torch.nn.Module) -> torch.nn.Module:
    """The unembedding of a causal LM; raises ChassisError where there is none with a weight [V, D]."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or getattr(head, "weight", None) is None:
        raise ChassisError(f"{type(model).__name__} has no output embeddings with a weight: give a causal language model")
    return head


class _Plan(NamedTuple):
    """What one call of the op needs: one adapter's tensors and no ids, or A stacked ones and an id for each request."""

    U: Tensor  # [D, r] or [A, D, r]
    V: Tensor  # [r, K] or [A, r, K]
    bias: Tensor
    mean: Tensor
    cols: Tensor | None  # [K] or [A, K]
    ids: Tensor | None  # [requests] int64, -1 is the base

    def to(self, device: torch.device) -> _Plan:
        return _Plan(*(None if tensor is None else tensor.to(device) for tensor in self))


def _weights(route: Route) -> dict[str, float]:
    return {route: 1.0} if isinstance(route, str) else dict(route)


def _plan(routes: Sequence[Route], adapters: Mapping[str, Adapter]) -> _Plan | None:
    """The distinct changes among `routes`, each composed once, and which of them each request takes."""
    distinct: dict[tuple, int] = {}
    chosen: list[Adapter] = []
    ids = []
    for route in routes:
        parts = [(weight, name) for name, weight in _weights(route).items() if name != BASE and weight != 0]
        key = tuple(sorted(parts))
        if key and key not in distinct:
            distinct[key] = len(chosen)
            alone = len(parts) == 1 and parts[0][0] == 1
            chosen.append(adapters[parts[0][1]] if alone else combine([(w, adapters[n]) for w, n in parts]))
        ids.append(distinct.get(key, -1))
    if not chosen:
        return None
    if len(set(ids)) == 1:
        only = chosen[0]
        return _Plan(only.U, only.V, only.bias, only.mean, only.cols, None)
    names = "U", "V", "bias", "mean"
    stacked = {name: [getattr(adapter, name) for adapter in chosen] for name in names}
    columns = [adapter.cols for adapter in chosen]
    if any(cols is not None for cols in columns):
        stacked["cols"] = columns
    return _Plan(**stack_adapters(**stacked), ids=torch.tensor(ids))


def _rows(ids: Tensor, logits: Tensor) -> Tensor:
    """The id of each row of `logits` [B, ..., V]: the rows of a request follow each other."""
    requests, batch = len(ids), logits.shape[0]
    if batch % requests:
        raise ChassisError(f"{requests} requests are routed and the batch has {batch} rows: route one request for each")
    each = logits.numel() // logits.shape[-1] // requests
    return ids if each == 1 else ids.repeat_interleave(each)
