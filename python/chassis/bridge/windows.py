"""A long text in windows that both models read in full, cut where tokens of both end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from chassis.bridge.bridge import Bridge
from chassis.bridge.counting import joint_text


@dataclass(frozen=True)
class TextWindow:
    """A stretch of a text; its first `seen` bytes were part of the window before and are there as context."""

    text: str
    seen: int

    @property
    def n_bytes(self) -> int:
        """Bytes that are scored in this window."""
        return len(self.text.encode()) - self.seen


def text_windows(bridge: Bridge, text: str, length: int = 128, *, overlap: bool = True) -> Iterator[TextWindow]:
    """Windows of at most `length` tokens of either tokenizer (more where they have no common end in between).

    They overlap by half, so that what is scored has context; without `overlap` each begins where the one before ends.
    """
    text = joint_text(bridge.expert, bridge.base, text)
    one, other = bridge.expert.encode(text), bridge.base.encode(text)
    data = one.data
    common = np.intersect1d(one.ends, other.ends)
    common = np.array([0, *(end for end in common.tolist() if end == len(data) or data[end] & 0xC0 != 0x80)])
    counts = [np.searchsorted(ends, common, side="right") for ends in (one.ends, other.ends)]  # tokens up to each end

    def reach(n: int) -> list[int]:
        """For each common end the last with at most n tokens of either kind since."""
        return (np.min([np.searchsorted(count, count + n, side="right") for count in counts], axis=0) - 1).tolist()

    whole, half = reach(length), reach(length // 2)
    begin, scored = 0, 0
    while scored < len(common) - 1:
        end = max(whole[begin], scored + 1)
        yield TextWindow(data[common[begin] : common[end]].decode(), int(common[scored] - common[begin]))
        scored = end
        while begin < scored and (half[begin] < scored or not overlap):
            begin += 1
