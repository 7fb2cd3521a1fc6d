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


def distinct(places: np.ndarray, n: int) -> np.ndarray:
    """The different ones of `places`, which are below `n`, in order; quicker than np.unique where they lie close."""
    there = np.zeros(n, dtype=bool)
    there[places] = True
    return np.flatnonzero(there)


def log_totals(logs: np.ndarray, start: np.ndarray) -> np.ndarray:
    """log Σ exp of each stretch logs[start[i]:start[i + 1]]; -inf of an empty one."""
    which = np.repeat(np.arange(len(start) - 1), np.diff(start))
    top = np.full(len(start) - 1, -np.inf)
    np.maximum.at(top, which, logs)
    finite = np.where(top == -np.inf, 0.0, top)
    with np.errstate(divide="ignore"):
        return np.log(np.bincount(which, np.exp(logs - finite[which]), len(top))) + finite
