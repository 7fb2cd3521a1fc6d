"""NaN and infinite logits, refused while a model generates.

    model.generate(..., logits_processor=[FiniteLogits(prompts, start=input_ids.shape[1])])

Greedy decoding would go on with a token that means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

from chassis.errors import ChassisError


class FiniteLogits(LogitsProcessor):
    """Raises ChassisError, which names prompt and token, at the first step where a row's highest logit is not finite.

    `prompts`: one for each request; its rows (beams, samples) follow each other. `start`: tokens of the padded prompts.
    Logits of -inf beside a finite one are what other processors rule out. A step costs one read of the logits.
    """

    def __init__(self, prompts: Sequence[str], start: int) -> None:
        self.prompts, self.start = list(prompts), start

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        highest = scores.amax(-1)
        if not math.isfinite(highest.sum().item()):
            row = highest.isfinite().logical_not().nonzero()[0].item()
            prompt = self.prompts[row * len(self.prompts) // len(scores)]
            raise ChassisError(
                f"the logits for token {input_ids.shape[1] - self.start + 1} after {prompt!r} are NaN or infinite: "
                "try dtype float32; if they stay so, weights of the base or of what is plugged into it are damaged"
            )
        return scores
