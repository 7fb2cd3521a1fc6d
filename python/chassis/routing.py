"""Who should speak on a prompt: routes as they are typed, and the rule of "auto".

"auto" is the one that is least surprised by the prompt: of the base and every adapter, the one under which the prompt's own
tokens have the lowest mean negative log-likelihood. One forward pass of the base serves them all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from chassis.adapter import Adapter
from chassis.errors import ChassisError
from chassis.models import Head, capture
from chassis.port import BASE, Route
from chassis_kernels import delta_logits_

TILE = 256  # positions whose logits are held at once


@torch.no_grad()
def surprise(model: torch.nn.Module, head: Head, adapters: Mapping[str, Adapter], input_ids: Tensor) -> dict[str, float]:
    """Mean negative log-likelihood of a prompt's tokens after the first, in nats, under the base and each adapter.

    `input_ids` [T] or [1, T]; with one token all are 0. What is plugged into the model plays no part. Raises ChassisError
    if the logits of the base or of an adapter are NaN or infinite.
    """
    ids = input_ids.reshape(-1).to(head.weight.device)
    hidden = capture(model, ids[None]).final[0]
    totals = dict.fromkeys([BASE, *adapters], 0.0)
    for start in range(0, len(ids), TILE):
        tile, following = hidden[start : start + TILE], ids[start + 1 : start + 1 + TILE]
        plain = torch.nn.functional.linear(tile, head.weight, head.bias).float()
        for name in totals:
            logits = plain if name == BASE else _changed(plain, tile, adapters[name].to(plain.device))
            logits = logits * head.scale
            logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
            if not torch.isfinite(logits).all():
                raise ChassisError(
                    f"the logits of {name!r} are NaN or infinite on this prompt: try dtype float32, or fit again"
                )
            rows = logits[: len(following)]
            totals[name] += torch.nn.functional.cross_entropy(rows, following, reduction="sum").item()
    return {name: total / max(1, len(ids) - 1) for name, total in totals.items()}


def least_surprised(surprises: Mapping[str, float]) -> str:
    """The name of the lowest of `surprise`; of equals the first, which is the base."""
    return min(surprises, key=surprises.__getitem__)


def parse_route(text: str) -> Route:
    """`code`, `base`, or weights such as `code=0.7,docs=0.3`; raises ChassisError for anything else."""
    if "=" not in text:
        return text
    pairs = [part.strip().rpartition("=") for part in text.split(",")]
    try:
        route = {name: float(weight) for name, _, weight in pairs}
    except ValueError:
        route = {}
    if len(route) != len(pairs) or not all(route):
        raise ChassisError(f"route {text!r}: expected a name, or weights such as code=0.7,docs=0.3")
    return route


def _changed(logits: Tensor, hidden: Tensor, adapter: Adapter) -> Tensor:
    return delta_logits_(logits.clone(), hidden, adapter.U, adapter.V, adapter.bias, mean=adapter.mean, cols=adapter.cols)
