"""What the base is taught to speak like: another checkpoint, a callable, a logit bias, or a synthetic low-rank change.

Every expert turns a batch into rows that a `Readout` maps to logits: `logits = cap(scale * (h W^T + bias))`. That the
target is linear in h is what lets the fit work on hidden states and never on [N, V] logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from chassis.errors import ChassisError
from chassis.models import Head, capture, inspect_head, load_causal_lm, vocabulary_hash
from chassis.text.corpus import Document

if TYPE_CHECKING:  # these know of experts
    from chassis.closed_form import Change
    from chassis.probes import Window
    from chassis_kernels import Moments


class Readout(NamedTuple):
    """How rows become logits. `weight` is None when the rows are logits already."""

    weight: torch.Tensor | None  # [V, E]
    bias: torch.Tensor | None = None  # [V]
    softcap: float | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, head: Head) -> Readout:
        """The readout of a model's own unembedding."""
        bias = None if head.bias is None else head.bias.detach()
        return cls(head.weight.detach(), bias, head.softcap, head.scale)


def same_unembedding(a: Readout, b: Readout) -> bool:
    """Whether two readouts read one and the same tensor (each `detach` makes a new object of it)."""
    if a.weight is None or b.weight is None:
        return False
    return a.weight.data_ptr() == b.weight.data_ptr() and a.weight.shape == b.weight.shape


class Expert(Protocol):
    """`rows` gives [B, T, E] for a batch, in the space `readout` reads, from `base_final` [B, T, D] where that is enough.
    `log_probs` is False."""

    name: str
    readout: Readout
    log_probs: bool

    def rows(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, base_final: torch.Tensor) -> torch.Tensor: ...


class ProbabilityExpert(Protocol):
    """`rows` gives (log-probabilities over the base's tokens [n, V] of n positions in reading order, where they are [B, T]).
    `log_probs` is True.

    `windows` cuts documents where both models can read them. `prepare` tells it of windows before `rows` is asked for them,
    of many at a time, which costs less. `plain_forward` is what reading windows costs the expert alone. `rows` also adds to
    `pairs`, Moments(D, width), the final states of both models where they have read the same text, as long as it needs more
    of them. From these `semantic_change` is the change of the logits of the base `readout` that the expert's states
    foretell, to start from; it raises BridgeError where they foretell none.
    """

    name: str
    readout: Readout
    log_probs: bool
    width: int  # of its final states

    def windows(self, documents: Sequence[Document], length: int) -> list[Window]: ...

    def prepare(self, windows: Sequence[Window]) -> None: ...

    def plain_forward(self, windows: Sequence[Window]) -> None: ...

    def rows(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        base_final: torch.Tensor,
        pairs: Moments | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def semantic_change(self, base: Readout, pairs: Moments, alpha: float) -> Change: ...


AnyExpert = Expert | ProbabilityExpert


class ModelExpert:
    """Another causal LM with the same vocabulary."""

    log_probs = False

    def __init__(self, model: torch.nn.Module, head: Head, name: str = "expert") -> None:
        self.model, self.name, self.readout = model, name, Readout.of(head)

    def rows(self, input_ids, attention_mask, base_final):
        return capture(self.model, input_ids, attention_mask).final


class LogitBiasExpert:
    """The base with a constant added to the logits of some tokens: `bias` [V]."""

    log_probs = False

    def __init__(self, head: Head, bias: torch.Tensor, name: str = "logit bias") -> None:
        base = Readout.of(head)
        if bias.shape != (head.vocab_size,):
            raise ChassisError(f"bias is {list(bias.shape)}, expected [{head.vocab_size}], one value for each token")
        total = bias.to(base.weight) if base.bias is None else base.bias + bias.to(base.bias)
        self.name, self.readout = name, base._replace(bias=total)

    def rows(self, input_ids, attention_mask, base_final):
        return base_final

    @classmethod
    def from_strings(cls, head: Head, tokenizer, edits: Mapping[str, float], name: str = "logit bias") -> LogitBiasExpert:
        """`edits` maps strings to what is added to their logits; each string must be one token of the vocabulary.

        Both spellings of a word, at the start of a word and inside one, are edited where the vocabulary has both.
        Raises ChassisError for a string that takes several tokens, naming them.
        """
        bias = torch.zeros(head.vocab_size, dtype=torch.float32)
        for text, value in edits.items():
            if not math.isfinite(value):
                raise ChassisError(f"the bias for {text!r} is {value}: expected a finite number")
            for token in token_ids(tokenizer, text):
                bias[token] += value
        return cls(head, bias, name)


class LowRankExpert:
    """The base with its final hidden state moved within r directions: h + (h U) V^T; U [D, r], V [D, r]."""

    log_probs = False

    def __init__(self, head: Head, U: torch.Tensor, V: torch.Tensor, name: str = "low-rank synthetic") -> None:
        if U.shape != V.shape or U.shape[0] != head.width:
            raise ChassisError(f"U {list(U.shape)} and V {list(V.shape)}: expected both [{head.width}, r]")
        self.U, self.V, self.name, self.readout = U, V, name, Readout.of(head)

    def rows(self, input_ids, attention_mask, base_final):
        u, v = self.U.to(base_final), self.V.to(base_final)
        return base_final + (base_final @ u) @ v.T

    @classmethod
    def random(cls, head: Head, rank: int = 64, std: float = 0.01, seed: int = 0) -> LowRankExpert:
        """Entries drawn from N(0, std²), as in the closed-form adapter experiments."""
        generator = torch.Generator().manual_seed(seed)
        u, v = (torch.randn(head.width, rank, generator=generator) * std for _ in range(2))
        return cls(head, u, v)


class CallableExpert:
    """Any function (input_ids [B, T], attention_mask [B, T]) -> logits [B, T, V] over the base's vocabulary."""

    log_probs = False

    def __init__(self, function: Callable, vocab_size: int, name: str = "callable") -> None:
        self.function, self.vocab_size, self.name, self.readout = function, vocab_size, name, Readout(None)

    def rows(self, input_ids, attention_mask, base_final):
        with torch.no_grad():
            logits = self.function(input_ids, attention_mask)
        expected = (*input_ids.shape, self.vocab_size)
        if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != expected:
            given = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ChassisError(f"expert {self.name!r} returned {given}, expected logits of shape {list(expected)}")
        return logits


def load_expert(spec: str, head: Head, tokenizer, *, revision: str | None = None, dtype=None, device="cpu") -> Expert:
    """The expert a command line names.

    `spec` is a folder or hub name of a causal LM with the base's vocabulary; `bias:Therefore=4,so=2` adds to logits of
    single tokens; `lowrank:64` is the synthetic expert of that rank. Raises ChassisError for anything else, and for a
    model whose tokenizer gives other ids to the same strings.
    """
    kind, _, rest = spec.partition(":")
    if kind == "bias":
        pairs = [item.rpartition("=") for item in rest.split(",")]
        try:
            edits = {text: float(value) for text, _, value in pairs}
        except ValueError:
            edits = {}
        if not edits or "" in edits:
            raise ChassisError(f"{spec!r}: expected bias:TEXT=NUMBER[,TEXT=NUMBER...]")
        return LogitBiasExpert.from_strings(head, tokenizer, edits, name=spec)
    if kind == "lowrank":
        if not rest.isdigit() or not 1 <= int(rest) <= head.width:
            raise ChassisError(f"{spec!r}: expected lowrank:RANK with a rank in 1..{head.width}")
        return LowRankExpert.random(head, int(rest))
    model, other = load_causal_lm(spec, revision=revision, dtype=dtype, device=device)
    if vocabulary_hash(other) != vocabulary_hash(tokenizer):
        raise ChassisError(
            f"the expert {spec} ({len(other)} tokens) and the base ({len(tokenizer)} tokens) have different vocabularies: "
            "an adapter on logits needs one vocabulary; give --bridge auto, or an expert with the base's tokenizer"
        )
    return ModelExpert(model, inspect_head(model), name=spec)


def token_ids(tokenizer, text: str) -> list[int]:
    """Ids of the single tokens that spell `text`, inside a word and (without leading space) at the start of one."""
    found, seen = [], []
    for spelling in dict.fromkeys((text, " " + text)):
        ids = tokenizer.encode(spelling, add_special_tokens=False)
        # SentencePiece-style tokenizers may set a bare space token in front: it is not part of the string.
        while len(ids) > 1 and not tokenizer.decode(ids[:1]).strip():
            ids = ids[1:]
        seen.append(tokenizer.convert_ids_to_tokens(ids))
        if len(ids) == 1 and tokenizer.decode(ids).strip() == text.strip() and ids[0] not in found:
            found.append(ids[0])
    if not found:
        raise ChassisError(f"{text!r} is not one token of this vocabulary: it is {' or '.join(map(str, seen))}")
    return found
