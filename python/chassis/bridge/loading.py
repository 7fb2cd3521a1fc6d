"""Both models of a bridge and the bridge between them, from names and files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from chassis.bridge.bridge import Bridge
from chassis.bridge.decoded import METHODS as DECODED
from chassis.bridge.decoded import decoded_bridge
from chassis.bridge.em import likeliest
from chassis.bridge.evaluate import evaluate, windows
from chassis.bridge.expert import BridgedExpert
from chassis.bridge.plan import Plan
from chassis.bridge.reading import Models, Reading, read
from chassis.bridge.rules import METHODS
from chassis.bridge.semantic import MODES, OnOpenMass, SemanticHead, head_by_rows, head_by_states
from chassis.bridge.states import tree_logits
from chassis.errors import BridgeError
from chassis.experts import Readout
from chassis.models import Head, inspect_head, load_tokenizer
from chassis.text.corpus import Document
from chassis.text.token_bytes import TokenBytes

AUTO = "auto"
FIT_WINDOWS = 160  # that both models read for a map between their hidden states
SHARE = 0.01  # below which a fit does not ask the expert
Progress = Callable[[str, int, int], None]


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

    def read(self, plan: Plan) -> torch.Tensor:
        """Logits [n_nodes, V] of this model as the expert, at the nodes of a plan."""
        return tree_logits(self.model, plan.tree, self.opens)


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
        return Bridge.build(expert.tokens, base.tokens, "counted", texts).find_splits()
    return Bridge.load(Path(spec), expert.tokens, base.tokens)


def bridged_expert(base: Side, expert: Side, bridge: Bridge, share: float = SHARE) -> BridgedExpert:
    """The expert as `chassis.fit` takes it; `share` as in `BridgedExpert`."""
    return BridgedExpert(expert.model, bridge, expert.opens, base.tokens.roles.get("bos"), expert.name, share=share)


def compare(
    base: Side,
    expert: Side,
    main: Bridge,
    documents: Mapping[str, Sequence[Document]],
    *,
    semantic: bool = False,
    em: int = 0,
    window: int = 128,
    progress: Progress = lambda stage, done, total: None,
    **settings,
) -> dict:
    """`evaluate` for the bridge `main` with and without its mask, beside the methods that need no text, string matching as
    it is usually done among them; for the report.

    `semantic` adds the heads of `semantic.MODES`, for which both models read documents["fit"]; `em` the likeliest table, for
    which the expert reads so many places of them. A bridge between a tokenizer and itself stands alone.
    """
    from chassis.results import environment

    if main.identical:
        bridges = {"identity": (main, False)}
    else:
        pair = expert.tokens, base.tokens
        tokenizers = expert.tokenizer, base.tokenizer
        bridges = {name: (decoded_bridge(method, *pair, tokenizers), False) for method, name in DECODED.items()}
        bridges |= {method: (Bridge.build(*pair, method), True) for method in (*METHODS, "jeffrey")}
        if main.method == "counted":
            bridges["jeffrey_counted"] = (main.asking_base(), True)
        if em:
            texts = [d.text for d in documents["fit"]]
            likelier = likeliest(main, texts, expert.read, window=window, positions=em, progress=progress)
            bridges["em"] = (likelier, True)
        bridges |= {f"{main.method}, no mask": (main, False), main.method: (main, True)}
    models, heads = models_of(base, expert), {}
    if semantic:
        heads = semantic_heads(models, base, expert, main, documents["fit"], window, progress)
    settings |= {"heads": heads, "window": window, "progress": progress}
    found = evaluate(models, bridges, documents, main=list(bridges)[-1], **settings)
    return found | {"base": Path(base.name).name, "expert": Path(expert.name).name, "environment": environment()}


def semantic_heads(
    models: Models,
    base: Side,
    expert: Side,
    bridge: Bridge,
    documents: Sequence[Document],
    window: int,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, SemanticHead | OnOpenMass]:
    """All of `semantic.MODES` by the names of their rows; hidden_ridge is fitted on up to FIT_WINDOWS of the documents.

    With a counted bridge also that head on its open mass.
    """
    ours, theirs = Readout.of(base.head), Readout.of(expert.head)
    parts = windows(bridge, documents, window, FIT_WINDOWS)

    def readings() -> Iterator[Reading]:
        for done, part in enumerate(parts, 1):
            yield read(models, bridge, part)
            progress("hidden ridge", done, len(parts))

    heads = [head_by_rows(mode, bridge, ours, theirs) for mode in MODES if mode != "hidden_ridge"]
    heads.append(head_by_states(bridge, ours, readings()))
    found = {f"semantic: {head.mode}": head for head in heads}
    if bridge.method == "counted":
        found["counted + hidden_ridge"] = OnOpenMass(heads[-1], bridge.asking_base())
    return found


def models_of(base: Side, expert: Side) -> Models:
    """The two models as `evaluate` takes them."""
    return Models(base.model, base.head.logits, base.tokens.roles.get("bos"), expert.model, expert.opens)
