"""Consecutive stretches of an array, given by where each begins."""

from __future__ import annotations

import numpy as np


def starts(sizes: np.ndarray) -> np.ndarray:
    """Where each of consecutive stretches of these sizes [n] begins, and where the last one ends, [n + 1]."""
    return np.append(0, np.cumsum(sizes, dtype=np.int64))


def ranges(start: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places start[w]:start[w + 1] of every w in `which`, one after the other, and the number of their w."""
    sizes = start[which + 1] - start[which]
    of = np.repeat(np.arange(len(which)), sizes)
    return np.arange(len(of)) - (sizes.cumsum() - sizes - start[which])[of], of
