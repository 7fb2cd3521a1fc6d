"""What the estimators keep of the rows they have seen: moments in folds, or the rows while they are fewer than columns.

Rows of one group (a document) always land in the same fold, so that cross-validation by group needs no second pass: the
moments of the other folds are S_all − S_fold, the inverse of a merge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from chassis_kernels import rows
from chassis_kernels.moments import Moments, add


class Rows(NamedTuple):
    """Few rows as they are."""

    x: Tensor  # [N, D]
    y: Tensor | None  # [N, T]
    weight: Tensor | None  # [N]

    @property
    def count(self) -> float:
        """Sum of the weights."""
        return float(len(self.x) if self.weight is None else self.weight.double().sum())

    def means(self) -> tuple[Tensor, Tensor | None]:
        """Weighted means [D] and [T], float64."""
        root = self._roots()
        total = root @ root
        x, y = (None if t is None else (root.square() @ t.double()) / total for t in (self.x, self.y))
        return x, y

    def about(
        self, intercept: bool = True, means: tuple[Tensor, Tensor | None] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """√w (x − m_x), √w (y − m_y), m_x, m_y in float64; the means are given, the rows' own or, without intercept, 0."""
        if len(self.x) == 0:
            raise ValueError("no rows to fit: N = 0")
        mean_x, mean_y = means or self.means()
        if not intercept:
            mean_x, mean_y = torch.zeros_like(mean_x), None if mean_y is None else torch.zeros_like(mean_y)
        root = self._roots()[:, None]
        y = None if self.y is None else root * (self.y.double() - mean_y)
        return root * (self.x.double() - mean_x), y, mean_x, mean_y

    def _roots(self) -> Tensor:
        if self.weight is None:
            return torch.ones(len(self.x), dtype=torch.float64, device=self.x.device)
        return self.weight.double().sqrt()


class Statistics:
    """Moments of x [N, D] and y [N, T] in `n_folds` folds; with `hold`, copies of the rows until there are D of them."""

    def __init__(
        self,
        dim_x: int,
        dim_y: int = 0,
        *,
        n_folds: int = 1,
        full_y: bool = False,
        hold: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.dim_x, self.dim_y, self.n_folds, self.full_y, self.device = dim_x, dim_y, n_folds, full_y, device
        self._held: list[tuple[Rows, Tensor]] | None = [] if hold else None
        self._moments: list[Moments] | None = None if hold else self._new()
        self.rows = self.dropped = 0

    def update(
        self, x: Tensor, y: Tensor | None, weight: Tensor | None = None, fold: Tensor | None = None, nan: str = "raise"
    ) -> None:
        """Add a batch; `fold` [N] int64 says where each row goes. Errors as for `Moments.update`, changing nothing."""
        batch, kept = rows.checked(x, y, weight, None, widths=(self.dim_x, self.dim_y), device=torch.device(self.device))
        [(kept, n_bad)] = rows.screened([batch], kept, nan)
        batch = rows.selected(batch, kept)
        if fold is not None and kept is not None:
            fold = fold[kept.to(fold.device)]
        self.rows += len(batch[0])
        self.dropped += n_bad
        if self._held is not None:
            fits = not self._held or _kind(self._held[0][0]) == _kind(batch)
            if self.rows < self.dim_x and fits:
                own = Rows(*(t if t is None else t.clone() for t in batch))
                self._held.append((own, torch.zeros(len(own.x), dtype=torch.int64) if fold is None else fold.cpu()))
                return
        self._split(batch, fold)

    @property
    def folds(self) -> list[Moments]:
        """The moments of every fold; held rows become moments."""
        if self._moments is None:
            held, self._held, self._moments = self._held, None, self._new()
            for batch, fold in held:
                self._split(batch, fold)
        return self._moments

    @property
    def moments(self) -> Moments:
        """The moments of all rows; with one fold the live ones."""
        first, *others = self.folds
        total = first.copy() if others else first
        for other in others:
            total.merge(other)
        return total

    def part(self, fold: int | None = None) -> Rows | Moments:
        """All rows, or those of a fold."""
        if not self._held:
            return self.moments if fold is None else self.folds[fold]
        everything = _joined([own for own, _ in self._held])
        return everything if fold is None else self._only(everything, lambda folds: folds == fold)

    def without(self, fold: int, everything: Rows | Moments) -> Rows | Moments:
        """The rows of all other folds, from `part()`: S_all − S_fold."""
        if isinstance(everything, Moments):
            return everything.copy().subtract(self.folds[fold])
        return self._only(everything, lambda folds: folds != fold)

    def merge(self, other: Statistics) -> None:
        """Add the rows that `other` has seen; raises ValueError, changing nothing, where the two do not go together."""
        mine, theirs = ((s.dim_x, s.dim_y, s.n_folds, s.full_y) for s in (self, other))
        if mine != theirs:
            raise ValueError(f"statistics with (dim_x, dim_y, n_folds, full_y) = {mine} and {theirs} do not go together")
        self.rows, self.dropped = self.rows + other.rows, self.dropped + other.dropped
        held = None if self._held is None or other._held is None else self._held + other._held
        if held is not None and self.rows < self.dim_x and len({_kind(own) for own, _ in held}) <= 1:
            self._held = held
            return
        for own, added in zip(self.folds, other.copy().folds, strict=True):
            own.merge(added)

    def copy(self) -> Statistics:
        """Independent statistics with the same content."""
        new = Statistics(self.dim_x, self.dim_y, n_folds=self.n_folds, full_y=self.full_y, hold=True, device=self.device)
        new._held = None if self._held is None else list(self._held)
        new._moments = None if self._moments is None else [moments.copy() for moments in self._moments]
        new.rows, new.dropped = self.rows, self.dropped
        return new

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Merge over the ranks of `group`."""
        for moments in self.folds:
            moments.all_reduce(group)
        counts = torch.tensor([self.rows, self.dropped], device=self.device)
        torch.distributed.all_reduce(counts, group=group)
        self.rows, self.dropped = counts.tolist()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on bit for bit."""
        state = {"rows": torch.tensor(self.rows), "dropped": torch.tensor(self.dropped)}
        if self._held is None:
            parts = [(f"fold{k}.", moments.state_dict()) for k, moments in enumerate(self._moments)]
        else:
            parts = [
                (f"held{k}.", {n: t for n, t in zip("x y weight fold".split(), (*own, fold), strict=True) if t is not None})
                for k, (own, fold) in enumerate(self._held)
            ]
        return state | {prefix + name: tensor for prefix, each in parts for name, tensor in each.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the `state_dict` of statistics of the same shape."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            prefix, _, own = name.rpartition(".")
            parts.setdefault(prefix, {})[own] = tensor
        counts = parts.pop("")
        if any(prefix.startswith("fold") for prefix in parts):
            moments = self._new()
            for k, each in enumerate(moments):
                each.load_state_dict(parts[f"fold{k}"])
            self._held, self._moments = None, moments
        else:
            ordered = (parts[f"held{k}"] for k in range(len(parts)))
            self._held = [(Rows(p["x"], p.get("y"), p.get("weight")), p["fold"].cpu()) for p in ordered]
            self._moments = None
        self.rows, self.dropped = int(counts["rows"]), int(counts["dropped"])

    def _new(self) -> list[Moments]:
        return [Moments(self.dim_x, self.dim_y, full_y=self.full_y, device=self.device) for _ in range(self.n_folds)]

    def _only(self, everything: Rows, choose: Callable[[Tensor], Tensor]) -> Rows:
        chosen = choose(torch.cat([folds for _, folds in self._held])).to(everything.x.device)
        return Rows(*rows.selected(everything, chosen))

    def _split(self, batch: rows.Batch, fold: Tensor | None) -> None:
        for k, moments in enumerate(self.folds):
            if self.n_folds == 1:
                add([moments], [batch], [(None, 0)])
            elif (mine := (fold == k).to(batch[0].device)).any():
                add([moments], [batch], [(mine, 0)])


def _kind(batch: Sequence[Tensor | None]) -> tuple:
    return tuple(None if t is None else t.dtype for t in batch[:2])


def _joined(parts: Sequence[Rows]) -> Rows:
    weight = None
    if any(part.weight is not None for part in parts):
        weight = torch.cat([part._roots().square() for part in parts])
    y = None if parts[0].y is None else torch.cat([part.y for part in parts])
    return Rows(torch.cat([part.x for part in parts]), y, weight)


def fold_of(groups: Any, n_folds: int) -> Tensor:
    """[N] int64: the fold of each row from the name of its group, the same in every process and order; ints or strings."""
    names = groups.detach().cpu().numpy() if isinstance(groups, Tensor) else np.asarray(groups)
    if names.ndim != 1 or names.dtype.kind not in "iubOUS":
        raise ValueError(f"groups is {names.dtype} of shape {names.shape}, expected one integer or string per row, [N]")
    unique, place = np.unique(names.astype(str) if names.dtype.kind in "OUS" else names, return_inverse=True)
    digests = (hashlib.blake2b(str(name).encode(), digest_size=8).digest() for name in unique.tolist())
    fold = np.array([int.from_bytes(digest, "little") % n_folds for digest in digests], dtype=np.int64)
    return torch.from_numpy(fold[place])
