"""Decoding with two models at once, whatever their tokenizers: the base's own probabilities mixed with the bridged expert's.

    next token ~ (1 - weight) q + weight p        q the expert's, through the bridge; p the base's

The text is planned anew for each token, and both models read all of it: simple, and quadratic in its length.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from chassis.bridge.bridge import Bridge
from chassis.bridge.loading import Side
from chassis.bridge.lookahead import lookahead
from chassis.bridge.states import ExpertStates
from chassis.errors import BridgeError
from chassis.models import capture

FILLERS = (
    "\x00",
    "ʘ",
    " a",
    "\n",
    "  a",
    "a",
    "1",
    ".",
)  # the row before a filler depends on the text alone, whatever the filler


@torch.no_grad()
def next_distribution(base: Side, expert: Side, bridge: Bridge, text: str, *, evaluations: int = 0) -> tuple[Tensor, Tensor]:
    """(q, p), each [V] float64: of the base's token after `text` by the bridged expert and by the base.

    `evaluations`: lookahead. Raises BridgeError for a text to which no filler can be added without changing its tokens.
    """
    ids = base.tokens.encode(text).ids
    plan = next((p for f in FILLERS if np.array_equal((p := bridge.plan(text + f)).base_ids[: len(ids)], ids)), None)
    if plan is None or len(plan) == len(ids):
        raise BridgeError(
            f"the end of {text[-20:]!r} joins whatever follows: go on from a text that ends with a whole token"
        )
    bos = base.tokens.roles.get("bos")
    seen = ids if bos is None else np.append(bos, ids)
    if not len(seen):
        raise BridgeError("the prompt is empty and the base has no bos token: give some text to go on from")
    final = capture(base.model, torch.from_numpy(seen)[None]).final[0, -1:]
    p = base.head.logits(final)[0, : base.tokens.width].double().softmax(-1)
    states = ExpertStates(expert.model, expert.opens)
    logits = states.grow(plan.tree.tokens, plan.tree.parent)
    if evaluations:
        result = lookahead(bridge, plan, states, logits, evaluations)
    else:  # of the base's log-probabilities only those of the row that is read need be right
        log_p = p.log().float().expand(len(plan), -1) if bridge.asks_base else None
        result = bridge.apply(plan, logits, base_log_probs=log_p)
    return result.log_q[len(ids)].double().exp(), p


def speak(
    base: Side,
    expert: Side,
    bridge: Bridge,
    prompt: str,
    *,
    weight: float = 0.2,
    max_new_tokens: int = 64,
    evaluations: int = 0,
    generator: torch.Generator | None = None,
) -> str:
    """What the two say after `prompt`: greedy, or drawn with `generator`. Ends before the base's end token.

    Tokens that are parts of characters are left out. Raises BridgeError for a weight outside 0..1.
    """
    if not 0 <= weight <= 1:
        raise BridgeError(f"weight {weight}: expected 0 (the expert alone) to 1 (the base alone)")
    whole = torch.tensor([ok and _is_text(data) for ok, data in zip(base.tokens.is_text, base.tokens.bytes, strict=True)])
    ends = [base.tokens.roles[role] for role in ("eos", "eot") if role in base.tokens.roles]
    whole[ends] = True
    text = prompt
    for _ in range(max_new_tokens):
        q, p = next_distribution(base, expert, bridge, text, evaluations=evaluations)
        mixed = torch.where(whole, (1 - weight) * q + weight * p, 0.0)
        token = int(mixed.argmax() if generator is None else torch.multinomial(mixed, 1, generator=generator))
        if token in ends:
            break
        text += base.tokens.bytes[token].decode()
    return text[len(prompt) :]


def _is_text(data: bytes) -> bool:
    return data.decode(errors="ignore").encode() == data
