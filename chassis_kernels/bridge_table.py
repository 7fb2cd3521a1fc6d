"""BridgeTable: per expert token a few base tokens with their shares; BlockedTokens: what cannot follow a base token."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from chassis_kernels.sparse import ColumnView

ROW_SUM_SLACK = 1e-5  # what float32 shares that add up to 1 may sum to beyond it


@dataclass(frozen=True, eq=False)
class BridgeTable:
    """M [rows, V_B], row t: `ids[start[t]:start[t + 1]]` with `weights`, the shares of t's probability.

    start [rows + 1] int, ids [nnz] int, strictly ascending within a row, weights [nnz] float >= 0, all on one device; a row
    may sum to less than 1 or be empty (the rest is unmapped), not to more. The first `n_expert` rows (all, unless given) are
    the expert's tokens; the rows after them (residuals of tokens, say) are reached by `ids` of bridge_project alone.
    Raises ValueError, with counts, for anything else. `from_entries` sorts and adds up what is in no order.
    """

    start: Tensor
    ids: Tensor
    weights: Tensor
    n_base: int
    n_expert: int | None = None

    def __post_init__(self) -> None:
        start, ids, weights = self.start, self.ids, self.weights
        check_lists("BridgeTable", start, ids, "ids", self.n_base)
        if weights.shape != ids.shape or not weights.is_floating_point():
            raise ValueError(f"weights are {weights.dtype} {tuple(weights.shape)}, expected floats {tuple(ids.shape)}")
        n_rows = len(start) - 1
        n_expert = n_rows if self.n_expert is None else self.n_expert
        if not 0 <= n_expert <= n_rows:
            raise ValueError(f"n_expert is {n_expert}: expected 0..{n_rows}, the number of rows")
        not_finite, negative = int((~weights.isfinite()).sum()), int((weights < 0).sum())
        if not_finite or negative:
            raise ValueError(f"of {len(weights)} weights {not_finite} are NaN or infinite and {negative} negative")
        object.__setattr__(self, "start", start.to(torch.int64))
        object.__setattr__(self, "ids", ids.to(torch.int32))
        object.__setattr__(self, "weights", weights if weights.dtype == torch.float64 else weights.float())
        object.__setattr__(self, "n_expert", n_expert)
        unsorted = int(((self.ids.diff() <= 0) & (self.rows.diff() == 0)).sum())
        if unsorted:
            raise ValueError(
                f"{unsorted} ids repeat or precede the id before them in their row: BridgeTable.from_entries sorts entries "
                "and adds up equal ones"
            )
        heavy = int((self.row_sum > 1 + ROW_SUM_SLACK).sum())
        if heavy:
            raise ValueError(
                f"{heavy} of {n_rows} rows sum to more than 1, up to {float(self.row_sum.max()):.6g}: shares of a "
                "token's probability are wanted"
            )

    @classmethod
    def from_entries(
        cls, rows: Tensor, ids: Tensor, weights: Tensor, shape: tuple[int, int], *, n_expert: int | None = None
    ) -> BridgeTable:
        """The table [rows, V_B] of entries (row, id, weight) in any order; equal places add up, weights of 0 are dropped."""
        n_rows, n_base = shape
        for name, places, size in (("rows", rows, n_rows), ("ids", ids, n_base)):
            if len(places) and not (0 <= int(places.min()) and int(places.max()) < size):
                raise ValueError(
                    f"{name} hold {int(places.min())} to {int(places.max())}: expected 0..{size - 1} in a table {shape}"
                )
        kept = weights != 0  # a NaN stays, to be refused
        keys, place = torch.unique(rows[kept].to(torch.int64) * n_base + ids[kept], return_inverse=True)
        summed = weights.new_zeros(len(keys), dtype=torch.float64).index_add(0, place, weights[kept].double())
        start = torch.zeros(n_rows + 1, dtype=torch.int64, device=keys.device)
        start[1:] = torch.bincount(keys // max(n_base, 1), minlength=n_rows).cumsum(0)
        return cls(start, keys % max(n_base, 1), summed.to(weights.dtype), n_base, n_expert)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.start) - 1, self.n_base

    @functools.cached_property
    def rows(self) -> Tensor:
        """The row of every entry, [nnz] int64."""
        return torch.repeat_interleave(torch.arange(len(self.start) - 1, device=self.start.device), self.start.diff())

    @functools.cached_property
    def row_sum(self) -> Tensor:
        """The mapped share of each row, [rows]."""
        total = self.weights.new_zeros(len(self.start) - 1, dtype=torch.float64)
        return total.index_add(0, self.rows, self.weights.double()).to(self.weights.dtype)

    @functools.cached_property
    def spread(self) -> Tensor:
        """1 - the largest share of each row, [rows]: 0 where a token fixes the base token, 1 where a row is empty."""
        best = self.weights.new_zeros(len(self.start) - 1).scatter_reduce(0, self.rows, self.weights, "amax")
        return (1 - best).clamp_min(0)

    @functools.cached_property
    def columns(self) -> ColumnView:
        """The entries by base token."""
        order = torch.argsort(self.ids, stable=True)
        start = torch.zeros(self.n_base + 1, dtype=torch.int64, device=self.ids.device)
        start[1:] = torch.bincount(self.ids, minlength=self.n_base).cumsum(0)
        return ColumnView(start, self.rows[order].to(torch.int32), self.weights[order])

    def dense(self) -> Tensor:
        """M itself, [rows, V_B]: for small tests."""
        return self.weights.new_zeros(self.shape).index_put((self.rows, self.ids.long()), self.weights)

    def to(self, device: torch.device | str) -> BridgeTable:
        """The same table on another device."""
        tensors = (t.to(device) for t in (self.start, self.ids, self.weights))
        return BridgeTable(*tensors, self.n_base, self.n_expert)


@dataclass(frozen=True, eq=False)
class BlockedTokens:
    """Lists of base tokens that cannot come next: list i is `tokens[start[i]:start[i + 1]]`, in any order.

    start [lists + 1] int, tokens [nnz] int in [0, n_base). For the canonical mask: one list per previous base token, of the
    tokens b for which encoding `previous b` gives another segmentation. Raises ValueError for anything else.
    """

    start: Tensor
    tokens: Tensor
    n_base: int

    def __post_init__(self) -> None:
        check_lists("BlockedTokens", self.start, self.tokens, "tokens", self.n_base)
        object.__setattr__(self, "start", self.start.to(torch.int64))
        object.__setattr__(self, "tokens", self.tokens.to(torch.int32))

    def __len__(self) -> int:
        return len(self.start) - 1

    def to(self, device: torch.device | str) -> BlockedTokens:
        """The same lists on another device."""
        return BlockedTokens(self.start.to(device), self.tokens.to(device), self.n_base)


def check_lists(owner: str, start: Tensor, ids: Tensor, name: str, n_base: int) -> None:
    """Raise ValueError unless `start` cuts `ids` [nnz], all in [0, n_base), into lists."""
    for given, tensor in (("start", start), (name, ids)):
        if tensor.dim() != 1 or tensor.is_floating_point():
            raise ValueError(f"{owner}.{given} is {tensor.dtype} {tuple(tensor.shape)}, expected integers, one dimension")
    if len(start) == 0 or int(start[0]) != 0 or int(start[-1]) != len(ids) or bool((start.diff() < 0).any()):
        ends = [int(start[0]), int(start[-1])] if len(start) else []
        raise ValueError(f"{owner}.start must ascend from 0 to {len(ids)}, the number of {name}: its ends are {ends}")
    outside = int(((ids < 0) | (ids >= n_base)).sum())
    if outside:
        raise ValueError(
            f"{outside} of {len(ids)} {name} are outside 0..{n_base - 1}: from {int(ids.min())} to {int(ids.max())}"
        )
