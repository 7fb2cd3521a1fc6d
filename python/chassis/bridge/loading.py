"""Both models of a bridge and the bridge between them, from names and files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from chassis.bridge.bridge import Bridge
from chassis.bridge.evaluate import Models, evaluate
from chassis.bridge.expert import BridgedExpert
from chassis.bridge.rules import METHODS
from chassis.errors import BridgeError
from chassis.models import Head, inspect_head, load_tokenizer
from chassis.text.corpus import Document
from chassis.text.token_bytes import TokenBytes

AUTO = "auto"


@dataclass
class Side:
    """One model with the bytes of its tokens. `opens`: the token before a text, its bos or, without one, its eos."""

    model: torch.nn.Module
    tokenizer: object
    name: str

    def __post_init__(self) -> None:
        self.head: Head = inspect_head(self.model)
        self.tokens = TokenBytes.from_tokenizer(self.tokenizer, width=self.head.vocab_size)

    @property
    def opens(self) -> int:
        for role in ("bos", "eos"):
            if role in self.tokens.roles:
                return self.tokens.roles[role]
        raise BridgeError(f"{self.name}: its tokenizer has neither a bos nor an eos token to open a text with")


def tokens_of(name: str) -> TokenBytes:
    """The bytes of the tokens of a model's tokenizer, as wide as its config says its head is, without loading the model."""
    tokenizer = load_tokenizer(name)
    try:
        width = AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config().vocab_size
    except (OSError, ValueError, AttributeError):  # a tokenizer that stands alone
        width = None
    return TokenBytes.from_tokenizer(tokenizer, width=width)


def bridge_for(base: Side, expert: Side, spec: str, texts: Iterable[str]) -> Bridge:
    """`spec` "auto": count a bridge on `texts`; else the file of one that was saved."""
    if spec == AUTO:
        return Bridge.build(expert.tokens, base.tokens, "counted", texts)
    return Bridge.load(Path(spec), expert.tokens, base.tokens)


def bridged_expert(base: Side, expert: Side, bridge: Bridge) -> BridgedExpert:
    """The expert as `chassis.fit` takes it."""
    return BridgedExpert(expert.model, bridge, expert.opens, base.tokens.roles.get("bos"), expert.name)


def compare(base: Side, expert: Side, main: Bridge, documents: Mapping[str, Sequence[Document]], **settings) -> dict:
    """`evaluate` for the bridge `main` with and without its mask, beside the methods that need no text; for the report.

    A bridge between a tokenizer and itself stands alone.
    """
    from chassis.results import environment

    if main.identical:
        bridges = {"identity": (main, False)}
    else:
        bridges = {method: (Bridge.build(expert.tokens, base.tokens, method), True) for method in (*METHODS, "jeffrey")}
        if main.method == "counted":
            bridges["jeffrey_counted"] = (main.asking_base(), True)
        bridges |= {f"{main.method}, no mask": (main, False), main.method: (main, True)}
    found = evaluate(models_of(base, expert), bridges, documents, main=list(bridges)[-1], **settings)
    return found | {"base": Path(base.name).name, "expert": Path(expert.name).name, "environment": environment()}


def models_of(base: Side, expert: Side) -> Models:
    """The two models as `evaluate` takes them."""
    return Models(base.model, base.head.logits, base.tokens.roles.get("bos"), expert.model, expert.opens)
