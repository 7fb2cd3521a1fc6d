"""A bridge: the expert's next-token probabilities as probabilities of the base's tokens.

    expert, base = TokenBytes.from_tokenizer(...), TokenBytes.from_tokenizer(...)
    bridge = Bridge.build(expert, base, "counted", texts)      # or a method of rules.METHODS, without texts
    plan = bridge.plan(text)                                   # base tokens; the tree of expert states they need
    logits = tree_logits(expert_model, plan.tree, start_id)    # [n_nodes, V_E], one forward
    result = bridge.apply(plan, logits)                        # log_q [n, V_B], mass [n], uncertainty [n]
    bits = bridge.nll(plan, result) / math.log(2)              # of plan.base_ids, given the text before each

    q(b) = P(the next token of the base's encoding is b | the text so far ends where one of its tokens ends)

Row i of the result predicts plan.base_ids[i] and depends on the text before it alone. `project` maps single distributions,
given full logits or a top-k list, where the expert's and the base's tokens end together. Methods of `jeffrey` also take the
base's log-probabilities; `em.likeliest` fits a counted bridge to what the expert says.
"""

from __future__ import annotations

import json
import math
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from chassis.bridge import jeffrey
from chassis.bridge.apply import States, project
from chassis.bridge.canonical import OTHERS, CanonicalMask
from chassis.bridge.counting import count, joint_text
from chassis.bridge.leaves import Leaves
from chassis.bridge.plan import Plan, identity_plan, make_plans
from chassis.bridge.pretokens import Splits
from chassis.bridge.row_probabilities import row_probabilities
from chassis.bridge.rules import METHODS, special_pairs, string_table
from chassis.bridge.under_way import UnderWay
from chassis.errors import BridgeError
from chassis.files import write_file
from chassis.text.samples import SAMPLES
from chassis.text.token_bytes import TokenBytes
from chassis_kernels import BridgeTable, bridge_project
from chassis_kernels.bridge_project import Bridged

COUNTED = ("counted", "jeffrey_counted")  # methods that need text
FORMAT = "chassis.bridge"
VERSIONS = "1", "2"  # 1: without `Splits`, which are then found where they are asked for
FLOOR = 1e-4  # share of the base's unigram distribution in a score, so that a token never counted has a probability


class Bridge:
    """`table` M [V_E + residuals, V_B], rows as in `leaves`; `mask`: what cannot follow; `unigram` [V_B]: the base's."""

    def __init__(
        self, expert: TokenBytes, base: TokenBytes, method: str, table: BridgeTable, leaves: Leaves, unigram: Tensor
    ) -> None:
        self.expert, self.base, self.method = expert, base, method
        self.table, self.leaves, self.unigram = table, leaves, unigram
        self.identical = expert.hash == base.hash and expert.bytes[: base.width] == base.bytes[: expert.width]
        self._kept: dict[str, dict] = {"expert": {}, "base": {}}  # what a file told of the masks
        self._under_way: UnderWay | None = None

    @classmethod
    def build(
        cls, expert: TokenBytes, base: TokenBytes, method: str = "counted", texts: Iterable[str] | None = None
    ) -> Bridge:
        """Build from the two vocabularies and, for methods in COUNTED, from any text of the kind it will be used on.

        Raises BridgeError for an unknown method, "em" (which asks the expert: see `em.likeliest`), tokenizers that lose text
        or whose normalizers differ in more than the Unicode normal form (which is warned of), and methods in COUNTED without
        texts or with less than 10 kB of them.
        """
        if method == "em":
            raise BridgeError("method 'em' needs the expert's model: count a bridge and give it to chassis.bridge.likeliest")
        if method not in (*METHODS, *COUNTED, "jeffrey"):
            known = ", ".join((*METHODS, "jeffrey", *COUNTED))
            raise BridgeError(f"method {method!r}: expected one of {known}, or em")
        if method in COUNTED and texts is None:
            raise BridgeError(f"method {method!r} needs texts to count on; without any, build 'canonical'")
        _check_pair(expert, base)
        leaves = Leaves(expert)
        unigram = torch.full((base.width,), 1 / base.width, dtype=torch.float64)
        if method in COUNTED:
            counts = count(expert, base, leaves, texts)
            table, unigram = counts.table(string_table("canonical", expert, base, leaves.strings)), counts.unigram()
        elif method == "jeffrey":
            table = jeffrey.string_ratios(expert, base, leaves)
        else:
            table = string_table(method, expert, base, leaves.strings)
        bridge = cls(expert, base, "counted" if method in COUNTED else method, table, leaves, unigram)
        return bridge.asking_base() if method == "jeffrey_counted" else bridge

    def asking_base(self) -> Bridge:
        """The "jeffrey_counted" bridge of the same counts; for a counted one."""
        if self.method != "counted":
            raise BridgeError(f"method {self.method}: only a counted bridge can ask the base for its ratios")
        ratios = jeffrey.counted_ratios(self.table, self.unigram)
        return Bridge(self.expert, self.base, "jeffrey_counted", ratios, self.leaves, self.unigram)

    @property
    def mask(self) -> CanonicalMask:
        """What cannot follow a base token; made when first asked for."""
        return self.masks["base"]

    @cached_property
    def masks(self) -> dict[str, CanonicalMask]:
        """What cannot follow a token of the "expert" and of the "base"."""
        return {name: CanonicalMask(getattr(self, name), **kept) for name, kept in self._kept.items()}

    def find_splits(self) -> Bridge:
        """Find out now what the masks will need, which `save` keeps; else it is found token by token as they come."""
        for mask in self.masks.values():
            mask.find_splits()
        self.masks["expert"].find_moves()
        return self

    @property
    def under_way(self) -> UnderWay:
        """Which expert tokens may be under way; made when first asked for."""
        if self._under_way is None:
            self._under_way = UnderWay(self.leaves, self.masks["expert"])
        return self._under_way

    @property
    def complete(self) -> bool:
        """Whether every expert token has base tokens: q then sums to 1, else to the mapped mass."""
        return self.method not in ("exact", "two_segment")

    @property
    def asks_base(self) -> bool:
        """Whether `apply` and `project` need the base's own log-probabilities: the table is then the W of `jeffrey`."""
        return self.method in jeffrey.METHODS

    def plan(self, text: str) -> Plan:
        """Base tokens of a text and the expert states they are predicted from. Raises BridgeError as `joint_text` does."""
        return self.plans([text])[0]

    def plans(self, texts: Sequence[str], *, followed: bool = False) -> list[Plan]:
        """The `plan` of each text, for less than one after the other.

        `followed`: without tokens under way of which the rest is blocked, most of them, and the states that only these need.
        log q is the same up to rounding, from fewer states; such plans are for this bridge alone, and not for
        `masked=False`. Where the table does not map every token, nothing is left out.
        """
        texts = [joint_text(self.expert, self.base, text) for text in texts]
        if self.identical:
            return [identity_plan(self.base, text) for text in texts]
        rule = self._followed if followed and self.complete else None
        return make_plans(self.expert, self.base, self.under_way, texts, rule)

    def _followed(self, options: np.ndarray, begun: np.ndarray, previous: np.ndarray) -> np.ndarray:
        return self.under_way.followed(options, begun, previous, self.table, self.mask)

    def apply(
        self,
        plan: Plan,
        logits: Tensor,
        *,
        base_log_probs: Tensor | None = None,
        log_sums: Tensor | None = None,
        masked: bool = True,
        temperature: float = 1.0,
    ) -> Bridged:
        """log q [n, V_B], mapped mass [n] and uncertainty [n] at the base positions of a plan.

        logits [n_nodes, >= V_E] of the next token at the nodes of `plan.tree`; log_sums [n_nodes] their log Σ exp where it
        is known; base_log_probs [n, V_B], the base's own, for methods that ask it. With the same tokenizer on both sides log
        q is log_softmax(logits), bit for bit. Within a word that the expert's tokens do not spell (its unknown token) no
        state is at hand: there log q is the base's unigram distribution, mass 0 and uncertainty 1. Raises BridgeError for
        tensors of another shape, and where the base's are missing.
        """
        tiles = self.tiles(plan, logits, base_log_probs, log_sums, masked=masked, temperature=temperature)
        log_q = torch.empty(len(plan), self.base.width, device=logits.device)
        mass, uncertainty = log_q.new_empty(len(plan)), log_q.new_empty(len(plan))
        for of, part in tiles:
            log_q[of], mass[of], uncertainty[of] = part.log_q, part.mass, part.uncertainty
        return Bridged(log_q, mass, uncertainty)

    def tiles(
        self,
        plan: Plan,
        logits: Tensor,
        base_log_probs: Tensor | None = None,
        log_sums: Tensor | None = None,
        *,
        masked: bool = True,
        temperature: float = 1.0,
        floored: bool = False,
    ) -> Iterator[tuple[slice, Bridged]]:
        """What `apply` gives, (positions, of them) at a time, in order. Raises as it does. `floored`: log q is what
        `self.floored` makes of it."""
        mix = self.floored if floored else lambda log_q: log_q
        self._check_logits(logits, len(plan.tree))
        if plan.options is not None and not masked:
            raise BridgeError("this plan leaves out what is blocked (plans(followed=True)): make another for masked=False")
        if self.identical:
            found = self._same(logits[torch.from_numpy(plan.ended)], temperature)
            yield slice(0, len(plan)), found._replace(log_q=mix(found.log_q))
            return
        states = States(plan, logits, self.under_way, self.padding, temperature, log_sums)
        blocked = self.mask.lists(plan.previous) if masked else None
        if self.asks_base:
            self._check_asked(base_log_probs, len(plan))
            for tile, P in row_probabilities(states, len(self.leaves), len(self.table.ids)):
                lists = None if blocked is None else (blocked[0], blocked[1][tile])
                found = jeffrey.weigh(P, self.table, base_log_probs[tile], lists, normalize=True)
                found = self._with_unknown(plan, tile, found)
                yield tile, found._replace(log_q=mix(found.log_q))
            return
        floor = self.floor.to(logits.device) if floored else None
        for tile, part in project(states, self.table, blocked, self.complete, floor):
            yield tile, self._with_unknown(plan, tile, part)

    def project(
        self,
        logits: Tensor | None = None,
        *,
        log_probs: Tensor | None = None,
        ids: Tensor | None = None,
        previous: Tensor | None = None,
        base_log_probs: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Bridged:
        """q = Pᵀ M for distributions right after an expert token that is complete: logits [N, >= V_E], or the top-k
        log_probs [N, k] of tokens ids [N, k]. previous [N]: the base tokens before them, to block what cannot follow.
        base_log_probs [N, V_B]: the base's own, for methods that ask it (`asks_base`)."""
        if logits is not None:
            self._check_logits(logits, len(logits))
            if self.identical:
                return self._same(logits, temperature)
            padding = self.padding
            logits = logits[:, : self.expert.width]
            logits = logits if padding is None else logits.masked_fill(padding.to(logits.device), -torch.inf)
        normalize = self.complete and logits is not None
        blocked = None if previous is None else self.mask.lists(previous.cpu().numpy())
        if self.asks_base:
            given = log_probs if logits is None else logits
            self._check_asked(base_log_probs, len(given))
            P = torch.zeros(len(given), len(self.leaves), device=given.device)
            if logits is None:
                P.scatter_add_(1, ids.clamp_min(0), torch.where(ids >= 0, log_probs.float().exp(), 0.0))
            else:
                P[:, : logits.shape[1]] = torch.softmax(logits.float() / temperature, 1)
            return jeffrey.weigh(P, self.table, base_log_probs, blocked, normalize=normalize)
        options = {} if blocked is None else {"blocked": blocked[0], "previous": blocked[1]}
        return bridge_project(
            logits, self.table, log_probs=log_probs, ids=ids, temperature=temperature, normalize=normalize, **options
        )

    def nll(self, plan: Plan, result: Bridged) -> Tensor:
        """Nats [n] that each base token costs, FLOOR of the base's unigram distribution mixed in."""
        ids = torch.from_numpy(plan.base_ids).to(result.log_q.device)
        chosen = result.log_q.gather(1, ids[:, None])[:, 0].double().exp()
        if self.identical:
            return -chosen.log()
        return -((1 - FLOOR) * chosen + FLOOR * self.unigram.to(ids.device)[ids]).log()

    @cached_property
    def floor(self) -> Tensor:
        """FLOOR of the base's unigram distribution, [V_B] float32."""
        return (FLOOR * self.unigram).float()

    def floored(self, log_q: Tensor) -> Tensor:
        """log q [n, V_B] with `floor` mixed in."""
        return torch.logaddexp(log_q + math.log1p(-FLOOR), self.floor.to(log_q).log())

    def coverage(self) -> dict:
        """Counts that tell how the vocabularies overlap and how sure the table is."""
        text = np.flatnonzero(self.expert.is_text)
        equal = sum(1 for data in self.expert.ids_by_bytes if data in self.base.ids_by_bytes)
        entries = self.table.start.diff()[: self.expert.width].numpy()
        special = [i for i, role in enumerate(self.expert.role_of) if role not in (None, "padding")]
        pairs = special_pairs(self.expert, self.base)
        return {
            "method": self.method,
            "expert_tokens": int(self.expert.n_tokens),
            "base_tokens": int(self.base.n_tokens),
            "byte_equal": equal,
            "byte_equal_share": equal / max(1, min(len(self.expert.ids_by_bytes), len(self.base.ids_by_bytes))),
            "unmapped_tokens": int((entries[text] == 0).sum()),
            "entries_per_token": float(entries[text].mean()),
            "certain_tokens": float((self.table.spread[torch.from_numpy(text)] < 1e-6).double().mean()),
            "residuals": len(self.leaves) - self.expert.width,
            "special_pairs": {self.expert.content[i]: self.base.content[b] for i, b in pairs.items()},
            "special_unmapped": [self.expert.content[i] for i in special if i not in pairs],
            "table_bytes": 8 * len(self.table.start) + 8 * len(self.table.ids),
        }

    def save(self, path: str | Path) -> Path:
        """Write the table, what the masks need and the hashes of both tokenizers as one safetensors file."""
        about = {"format": FORMAT, "version": VERSIONS[-1], "method": self.method}
        about |= {
            "expert": self.expert.hash,
            "base": self.base.hash,
            "names": json.dumps([self.expert.name, self.base.name]),
        }
        tensors = {"start": self.table.start, "ids": self.table.ids, "weights": self.table.weights, "unigram": self.unigram}
        for side, mask in self.find_splits().masks.items():
            tensors[f"{side}.alone"] = torch.from_numpy(np.packbits(mask.alone))
            if mask.splits is not None:
                tensors |= {f"{side}.{name}": torch.from_numpy(array) for name, array in mask.splits.pack().items()}
        tensors["expert.moves"] = torch.from_numpy(np.packbits(self.masks["expert"].find_moves(), axis=1))
        return write_file(path, save({name: t.cpu().contiguous() for name, t in tensors.items()}, about))

    @classmethod
    def load(cls, path: str | Path, expert: TokenBytes, base: TokenBytes) -> Bridge:
        """Read what `save` wrote; BridgeError for a file that is missing, damaged, no bridge, or for other tokenizers."""
        if not Path(path).exists():
            raise BridgeError(f"{path}: no such bridge; build one and save it")
        try:
            with safe_open(path, "pt") as file:
                about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise BridgeError(f"{path} is damaged ({error}): build the bridge again") from error
        if about.get("format") != FORMAT or about.get("version") not in VERSIONS:
            raise BridgeError(f"{path} is no bridge of version {' or '.join(VERSIONS)}: its metadata are {about}")
        for side, tokens in (("expert", expert), ("base", base)):
            if about[side] != tokens.hash:
                raise BridgeError(
                    f"{path} was built for another {side} tokenizer ({about['names']}), not for {tokens.name}; build one"
                )
        leaves = Leaves(expert)
        rows = len(tensors["start"]) - 1
        if rows != len(leaves) or len(tensors["unigram"]) != base.width:
            raise BridgeError(
                f"{path} has {rows} rows for {len(tensors['unigram'])} base tokens, expected {len(leaves)} and "
                f"{base.width}: it was built for heads of other widths"
            )
        table = BridgeTable(tensors["start"], tensors["ids"], tensors["weights"], base.width, expert.width)
        bridge = cls(expert, base, about["method"], table, leaves, tensors["unigram"])
        for (side, kept), tokens in zip(bridge._kept.items(), (expert, base), strict=True):
            packed = {name: tensors[f"{side}.{name}"].numpy() for name in Splits._fields if f"{side}.{name}" in tensors}
            kept["splits"] = Splits.unpack(packed) if packed else None
            if f"{side}.alone" in tensors:
                kept["alone"] = np.unpackbits(tensors[f"{side}.alone"].numpy(), count=tokens.width).view(bool)
            if f"{side}.moves" in tensors:
                kept["moves"] = np.unpackbits(tensors[f"{side}.moves"].numpy(), axis=1, count=len(OTHERS)).view(bool)
        return bridge

    def _same(self, logits: Tensor, temperature: float) -> Bridged:
        logits = logits[:, : self.base.width] / temperature if temperature != 1 else logits[:, : self.base.width]
        padding = self.padding
        logits = logits if padding is None else logits.masked_fill(padding.to(logits.device), -torch.inf)
        log_q = torch.log_softmax(logits.float(), 1)
        return Bridged(log_q, torch.ones_like(log_q[:, 0]), torch.zeros_like(log_q[:, 0]))

    @cached_property
    def padding(self) -> Tensor | None:
        """[V_E] bool: rows of the expert's head that are no token; None if all are."""
        padding = torch.tensor([role == "padding" for role in self.expert.role_of])
        return padding if padding.any() else None

    def _with_unknown(self, plan: Plan, tile: slice, result: Bridged) -> Bridged:
        """`result` with the base's unigram distribution where the plan has no state of the expert."""
        unknown = np.flatnonzero(np.diff(plan.ended_start + plan.begun_start)[tile] == 0)
        if len(unknown):
            result.log_q[unknown] = self.unigram.log().to(result.log_q)
            result.mass[unknown], result.uncertainty[unknown] = 0.0, 1.0
        return result

    def _check_asked(self, base_log_probs: Tensor | None, n: int) -> None:
        given = "missing" if base_log_probs is None else list(base_log_probs.shape)
        if given != [n, self.base.width]:
            raise BridgeError(
                f"base_log_probs are {given}, expected [{n}, {self.base.width}]: method {self.method} asks the base which "
                "of its tokens comes"
            )

    def _check_logits(self, logits: Tensor, rows: int) -> None:
        if logits.ndim != 2 or logits.shape[0] != rows or logits.shape[1] < self.expert.width:
            raise BridgeError(
                f"logits are {list(logits.shape)}, expected [{rows}, >= {self.expert.width}]: a row per state, a column per "
                "expert token"
            )


def _check_pair(expert: TokenBytes, base: TokenBytes) -> None:
    for tokens in (expert, base):
        if tokens.lossy:
            raise BridgeError(f"{tokens.name} drops white space (WordPiece): no bridge can tell what its tokens stand for")
    for sample in SAMPLES:
        one, other = expert.normalize(sample), base.normalize(sample)
        if one == other:
            continue
        if unicodedata.normalize("NFKC", one) != unicodedata.normalize("NFKC", other):
            raise BridgeError(
                f"the normalizers differ: {sample!r} is {one!r} for the expert and {other!r} for the base; "
                "no bridge can compare their bytes"
            )
        warnings.warn(f"the normalizers differ on {sample!r}: text is brought to a form that both leave alone", stacklevel=3)
        return
