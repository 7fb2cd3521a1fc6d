"""An expert with another tokenizer, for `chassis.fit`: its probabilities over the base's tokens, at every base position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from chassis.bridge.bridge import Bridge
from chassis.bridge.forest import Read, Reader
from chassis.bridge.initial import add_pairs, semantic_change
from chassis.bridge.plan import Plan
from chassis.bridge.stretches import ranges, starts
from chassis.bridge.windows import text_windows
from chassis.closed_form import Change
from chassis.errors import BridgeError
from chassis.experts import Readout
from chassis.models.forward import forward
from chassis.probes import Window, pad
from chassis.text.corpus import Document
from chassis_kernels import Moments, pages
from chassis_kernels.bridge_project import Bridged

PLANS = 4096  # texts whose plans are kept, at most: refinement comes back to them
CELLS = 16_000_000  # logits of the expert at hand at once


class BridgedExpert:
    """A causal LM read through a bridge. `rows` are log q [n, V], some of the base's unigram distribution mixed in.

    The row of a position predicts the token after it from the text before that token alone. Windows are cut by `windows`,
    where tokens of both models end. `share` leaves out states that hardly count (`forest`). `aligned_only` is the ablation:
    nothing is said but where a token of the expert ends in the encoding of the whole text, and there it is taken for known
    that one ended. The base cannot see that.
    """

    log_probs = True

    def __init__(
        self,
        model: torch.nn.Module,
        bridge: Bridge,
        start_id: int,
        bos_id: int | None,
        name: str = "expert",
        *,
        share: float = 0.0,
        aligned_only: bool = False,
    ) -> None:
        self.share, self.aligned_only = share, aligned_only
        self.model, self.bridge, self.start_id, self.bos_id, self.name = model, bridge, start_id, bos_id, name
        self.readout, self._reader = Readout(None), Reader(model, start_id, bridge)
        self._plans: dict[bytes, Plan] = {}

    def windows(self, documents: Sequence[Document], length: int) -> list[Window]:
        """Windows of at most `length` base tokens, in order of their hashes, no two alike."""
        found = {}
        for document in documents:
            for part in text_windows(self.bridge, document.text, length - 1, overlap=False):
                ids = self.bridge.base.encode(part.text).ids
                ids = ids if self.bos_id is None else np.concatenate([[self.bos_id], ids])
                if len(ids) < 2:
                    continue
                first = 0 if self.bos_id is not None else self.bridge.base.lengths[ids[0]]
                window = Window(ids.astype(np.int32), document.id, len(part.text.encode()) - int(first))
                found[window.key] = window
        if not found:
            raise BridgeError("the documents give no window of two tokens: give more text")
        return [found[key] for key in sorted(found)]

    @torch.no_grad()
    def plain_forward(self, windows: Sequence[Window]) -> None:
        """The model over the text of the windows in its own tokens: what reading it costs without a bridge."""
        texts = [self._text(window.ids) for window in windows]
        own = [np.array([self.start_id, *ids]) for ids in self.bridge.expert.ids_of(texts)]
        forward(self.model, *pad(own, "right")[:2])

    @property
    def width(self) -> int:
        """Of the model's final states."""
        return self._reader.head.width

    def semantic_change(self, base: Readout, pairs: Moments, alpha: float) -> Change:
        """What `initial.semantic_change` gives to start from."""
        return semantic_change(base, Readout.of(self._reader.head), self.bridge, pairs, alpha)

    def rows(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        base_final: torch.Tensor,
        pairs: Moments | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        is_text, device = self.bridge.base.is_text, base_final.device
        places, following = [], []
        windows = list(zip(input_ids.cpu().numpy(), attention_mask.bool().cpu().numpy(), strict=True))
        plans = self._plans_of([ids[mask] for ids, mask in windows])
        for row, ((ids, mask), plan) in enumerate(zip(windows, plans, strict=True)):
            # Row t predicts what follows position t: the text token of that number.
            number = np.cumsum(is_text[ids[mask]])
            places.append(row * len(mask) + np.flatnonzero(mask)[number < len(plan)])
            following.append(number[number < len(plan)])
        said = np.zeros(input_ids.numel(), dtype=bool)
        said[np.concatenate(places)] = True
        row_of, silent = said.cumsum() - 1, np.ones(int(said.sum()), dtype=bool)
        out = torch.empty(0, self.bridge.base.width, device=device)
        for group in self._groups(plans):
            begin = starts([len(plans[row]) for row in group])
            source = np.concatenate([following[row] + i for row, i in zip(group, begin, strict=False)])
            place = np.concatenate([places[row] for row in group])
            order = np.argsort(source, kind="stable")
            begins = np.searchsorted(source[order], np.arange(begin[-1] + 1))
            own = [plans[row] for row in group]
            read = self._reader.read(own, self.share)
            if pairs is not None:
                follow, at = ([column[row] for row in group] for column in (following, places))
                add_pairs(pairs, base_final.flatten(0, 1), read.trunks, own, follow, at)
            for positions, q in self._tiles(read, own):
                taken, of = ranges(begins, positions)
                into = row_of[place[order[taken]]]
                q = q if np.array_equal(of, np.arange(len(q))) else q[torch.from_numpy(of)]
                silent[into] = False
                if np.array_equal(into, np.arange(len(silent))):
                    out = q.to(device)
                    break  # all at once, and in order
                out = out if len(out) else pages.empty((len(silent), q.shape[1]), torch.float32, device)
                out.index_copy_(0, torch.from_numpy(into).to(device), q.to(device))
        if silent.any():
            said[np.flatnonzero(said)[silent]] = False
            out = out[torch.from_numpy(~silent).to(device)]
        return out, torch.from_numpy(said).view(input_ids.shape).to(device)

    def _tiles(self, read: Read, plans: Sequence[Plan]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """(positions [m], their log q [m, V]) of texts that were read at once."""
        if self.aligned_only:
            positions, part = self._aligned(plans[0], read.logits)
            yield positions, self.bridge.floored(part.log_q)
            return
        for of, part in self.bridge.tiles(read.plan, read.logits, log_sums=read.log_sums, floored=True):
            yield np.arange(of.start, of.stop), part.log_q

    def _groups(self, plans: Sequence[Plan]) -> Iterator[list[int]]:
        """Texts that are read at once: CELLS logits, trees of like numbers of branches, which attention pads to the most."""
        group: list[int] = []
        for row in sorted(range(len(plans)), key=lambda row: len(plans[row].tree) - plans[row].tree.n_trunk):
            cells = (len(group) + 1) * len(plans[row].tree) * self.bridge.expert.width
            if group and (cells > CELLS or self.aligned_only):
                yield sorted(group)
                group = []
            group.append(row)
        yield sorted(group)

    def _aligned(self, plan: Plan, logits: torch.Tensor) -> tuple[np.ndarray, Bridged]:
        """The base positions at which a token of the expert ends, read off the whole text, and q as if that were known."""
        ends = np.append(0, np.cumsum(self.bridge.expert.lengths[plan.expert_ids]))
        positions = np.flatnonzero(np.isin(plan.begins, ends))
        nodes = torch.from_numpy(np.searchsorted(ends, plan.begins[positions], side="right") - 1)
        previous = torch.from_numpy(np.append(-1, plan.base_ids)[positions])
        return positions, self.bridge.project(logits[nodes], previous=previous)

    def prepare(self, windows: Sequence[Window]) -> None:
        """Plans windows that `rows` will be asked for: many at once cost less."""
        self._plans_of([window.ids for window in windows])

    def _plans_of(self, windows: Sequence[np.ndarray]) -> list[Plan]:
        """The plans of windows given as base tokens [n]; those not known are made together and kept. Raises BridgeError for
        tokens that are not the base's encoding of their text."""
        texts = [ids[self.bridge.base.is_text[ids]].astype(np.int64) for ids in windows]
        keys = [tokens.tobytes() for tokens in texts]
        missing = {key: tokens for key, tokens in zip(keys, texts, strict=True) if key not in self._plans}
        if len(self._plans) + len(missing) > PLANS:
            self._plans.clear()
            missing = dict(zip(keys, texts, strict=True))
        found = self.bridge.plans([self._text(tokens) for tokens in missing.values()], followed=True)
        for (key, tokens), plan in zip(missing.items(), found, strict=True):
            if not np.array_equal(plan.base_ids, tokens):
                raise BridgeError(
                    f"the base tokens of {plan.data[:40]!r} are not the encoding of their text: cut windows with windows()"
                )
            self._plans[key] = plan
        return [self._plans[key] for key in keys]

    def _text(self, ids: np.ndarray) -> str:
        base = self.bridge.base
        try:
            return b"".join(base.bytes[token] for token in ids[base.is_text[ids]].tolist()).decode()
        except UnicodeDecodeError as error:
            raise BridgeError(
                "a window of base tokens ends inside a character: cut windows with BridgedExpert.windows"
            ) from error
