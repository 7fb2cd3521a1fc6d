"""What a teacher can be for the losses: its logits, its hidden states with their head, or its largest log-probabilities.

A loss compares the k columns J of the teacher's vocabulary that reach the largest logits anywhere in the batch. `compact`
reduces any teacher to them, a tile of the vocabulary at a time: hidden states and cached files never become [T, V_t] logits.
The definition, with those logits, is `reference/teacher.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from chassis_kernels.parallel.groups import ONE_RANK, Parallel
from chassis_kernels.reference.precision import compute_dtype
from chassis_kernels.sparse import ColumnView, take_columns

TILE_BYTES = 16 << 20  # float32 logits that exist at a time
LEAST_MASS = 1e-10  # left for the tokens that a TopK does not list, whatever its rounded entries sum to


class TeacherHead(NamedTuple):
    """Hidden states and the head that makes logits of them: cap(hidden weightᵀ + bias), cap(z) = s tanh(z / s)."""

    hidden: Tensor  # [B, T_t, D_t], what the unembedding reads
    weight: Tensor  # [>= V_t, D_t]
    bias: Tensor | None = None  # [>= V_t]
    softcap: float | None = None  # s


class TopK(NamedTuple):
    """The largest log-probabilities of every position at temperature 1, as a cache holds them.

    The tokens that a position does not list share the rest of its mass equally: log(remaining mass / remaining tokens) each,
    the mass at least 1e-10. These log-probabilities stand for the logits, also where columns are chosen.
    """

    log_probs: Tensor  # [B, T_t, m] nats
    ids: Tensor  # [B, T_t, m] int64, -1: an empty place; no token twice at a position


Teacher = Tensor | TeacherHead | TopK


class Compact(NamedTuple):
    """A teacher within the columns J."""

    columns: Tensor  # [k] int64, J
    logits: Tensor  # [B, T_t, k]; with the tail [B, T_t, k + 1], the last τ log Σ exp(z / τ) over all other columns


class Operands(NamedTuple):
    """A teacher as an op on columns takes it."""

    logits: Tensor  # [N_t, V_t], or compact: [N_t, k] or [N_t, k + 1]
    view: ColumnView  # of the logits' columns
    places: Tensor  # [k] int64, where J stands among the logits' columns
    columns: Tensor  # [k] int64, J as teacher tokens


def operands(
    teacher: Teacher,
    view: ColumnView,
    k: int,
    *,
    temperature: float,
    tail: bool,
    column_mask: Tensor | None,
    columns: Tensor | None,
    parallel: Parallel = ONE_RANK,
) -> Operands:
    """Logits as they are, the other forms compact."""
    n_teacher = len(view.start) - 1
    if isinstance(teacher, Tensor):
        logits = teacher.detach().flatten(0, 1)
        if columns is None:
            keep = None if column_mask is None else column_mask.flatten()
            columns = torch.ops.chassis.top_columns(logits[:, :n_teacher], keep, k)
        return Operands(logits, view, columns, columns)
    options = {"temperature": temperature, "tail": tail, "column_mask": column_mask, "columns": columns}
    columns, logits = compact(teacher, n_teacher, k, **options, parallel=parallel)
    view = take_columns(view, columns)
    if tail:
        view = view._replace(start=torch.cat([view.start, view.start[-1:]]))  # a column without entries
    return Operands(logits.flatten(0, 1), view, torch.arange(len(columns), device=columns.device), columns)


@torch.no_grad()
def compact(
    teacher: Teacher,
    n_teacher: int,
    k: int,
    *,
    temperature: float = 1.0,
    tail: bool = False,
    column_mask: Tensor | None = None,  # [B, T_t] bool
    columns: Tensor | None = None,  # [k] int64
    parallel: Parallel = ONE_RANK,
) -> Compact:
    """The teacher's first n_teacher tokens reduced to the columns J; float32 (float64 if the teacher is), detached.

    J: the k columns with the largest logits at the positions of `column_mask`, ascending, ties to the lowest id; or
    `columns`. A TeacherHead's products are in its own dtype where J is chosen and in float32 for the k columns. The tail
    alone depends on the temperature; it costs a second pass over the vocabulary. Besides the result: a tile of logits.
    parallel: where the sequence is spread over ranks, the positions of all of them choose J.
    """
    device = teacher.device.type if isinstance(teacher, Tensor) else teacher[0].device.type
    with torch.autocast(device, enabled=False):
        form = _FORMS.get(type(teacher), _Logits)(teacher)
        if columns is None:
            keep = None if column_mask is None else column_mask.flatten()
            best = form.maxima(n_teacher, keep)
            best = parallel.sequence_max(best.to(compute_dtype(best)))
            unique = columns = torch.ops.chassis.top_columns(best[None], None, k)
            logits = form.gather(n_teacher, columns)
        else:
            unique, inverse = columns.unique(return_inverse=True)
            logits = form.gather(n_teacher, unique)[..., inverse]
        if tail:
            rest = temperature * form.rest(n_teacher, unique, temperature)
            logits = torch.cat([logits, rest[..., None]], -1)
    return Compact(columns, logits)


def logits_shaped(teacher: Teacher, n_teacher: int) -> Tensor:
    """The teacher's logits or, after `check_teacher`, a tensor of their shape, dtype and device without their memory."""
    if isinstance(teacher, Tensor):
        return teacher
    positions = check_teacher(teacher, n_teacher)
    return teacher[0].new_empty(()).expand(*positions, n_teacher)


def check_teacher(teacher: Teacher, n_teacher: int) -> tuple[int, int]:
    """(B, T_t) of a teacher; ValueError, naming the numbers, for shapes, dtypes or ids that do not fit."""
    if isinstance(teacher, TeacherHead):
        hidden, weight, bias, softcap = teacher
        if hidden.dim() != 3 or weight.dim() != 2 or weight.shape[0] < n_teacher or weight.shape[1] != hidden.shape[2]:
            raise ValueError(
                f"TeacherHead holds hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}, expected [B, T, D] and "
                f"[>= {n_teacher}, D]"
            )
        if bias is not None and (bias.dim() != 1 or len(bias) < n_teacher):
            raise ValueError(f"TeacherHead.bias has shape {tuple(bias.shape)}, expected (>= {n_teacher},)")
        if softcap is not None and not softcap > 0:
            raise ValueError(f"TeacherHead.softcap is {softcap}: a softcap is positive, or None for no cap")
        return hidden.shape[:2]
    if isinstance(teacher, TopK):
        log_probs, ids = teacher
        if log_probs.dim() != 3 or ids.shape != log_probs.shape or ids.dtype != torch.int64:
            raise ValueError(
                f"TopK holds log_probs {tuple(log_probs.shape)} and ids {ids.dtype} {tuple(ids.shape)}, expected [B, T, m] "
                "and torch.int64 of that shape"
            )
        if ids.device.type == "cpu" and ids.numel() and not (int(ids.min()) >= -1 and int(ids.max()) < n_teacher):
            raise ValueError(f"TopK.ids go from {int(ids.min())} to {int(ids.max())}, with {n_teacher} teacher tokens")
        return log_probs.shape[:2]
    if not isinstance(teacher, Tensor):
        raise ValueError(f"the teacher is a {type(teacher).__name__}: give logits, a TeacherHead or a TopK")
    if teacher.dim() != 3 or teacher.shape[2] < n_teacher:
        raise ValueError(f"logits have shape {tuple(teacher.shape)}, expected [B, T, >= {n_teacher}]")
    return teacher.shape[:2]


class _Logits:
    """maxima [V_t], gather [B, T_t, k] and rest [B, T_t] of logits that come in tiles."""

    def __init__(self, logits: Tensor) -> None:
        self.rows, self.dtype, self.exact = logits, logits.dtype, compute_dtype(logits)

    def of(self, rows: Tensor, columns: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Logits [.., some columns] of some rows, in `dtype`."""
        return rows[..., columns].to(dtype)

    def tiles(self, rows: Tensor, n_teacher: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        width = max(64, TILE_BYTES // 4 // max(1, rows.shape[:-1].numel()))
        for first in range(0, n_teacher, width):
            columns = slice(first, min(first + width, n_teacher))
            yield columns, self.of(rows, columns, dtype)

    def maxima(self, n_teacher: int, keep: Tensor | None) -> Tensor:
        """The largest logit of each column over the positions kept; -inf where none is."""
        rows = self.rows.flatten(0, 1)
        rows = rows if keep is None else rows[keep]
        if len(rows) == 0:
            return rows.new_full((n_teacher,), -torch.inf)
        return torch.cat([tile.amax(0) for _, tile in self.tiles(rows, n_teacher, self.dtype)])

    def gather(self, n_teacher: int, columns: Tensor) -> Tensor:
        return self.of(self.rows, columns, self.exact)

    def rest(self, n_teacher: int, columns: Tensor, temperature: float) -> Tensor:
        """log Σ exp(z / τ) over all other columns."""
        inside = torch.zeros(n_teacher, dtype=torch.bool, device=columns.device)
        inside[columns] = True
        parts = [
            tile.div(temperature).masked_fill(inside[place], -torch.inf).logsumexp(-1)
            for place, tile in self.tiles(self.rows, n_teacher, self.exact)
        ]
        return torch.stack(parts).logsumexp(0)


class _Head(_Logits):
    def __init__(self, teacher: TeacherHead) -> None:
        self.rows, self.weight, self.bias, self.softcap = teacher
        self.exact = compute_dtype(self.rows, self.weight)
        self.dtype = self.rows.dtype if self.rows.dtype == self.weight.dtype else self.exact

    def of(self, rows: Tensor, columns: slice | Tensor, dtype: torch.dtype) -> Tensor:
        z = rows.to(dtype) @ self.weight[columns].to(dtype).T
        if self.bias is not None:
            z = z + self.bias[columns].to(dtype)
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


class _Listed:
    """The same of log-probabilities that are listed or shared out."""

    def __init__(self, teacher: TopK) -> None:
        self.shape = teacher.ids.shape[:2]
        self.ids, self.listed = teacher.ids.flatten(0, 1), teacher.ids.flatten(0, 1) >= 0
        self.entries = teacher.log_probs.flatten(0, 1).to(compute_dtype(teacher.log_probs))

    def filler(self, n_teacher: int) -> Tensor:
        """What a position gives to each token that it does not list, [N_t]."""
        mass = 1 - torch.where(self.listed, self.entries.double().exp(), 0.0).sum(1)
        share = mass.clamp_min(LEAST_MASS).log() - (n_teacher - self.listed.sum(1)).double().log()
        return share.to(self.entries.dtype)

    def maxima(self, n_teacher: int, keep: Tensor | None) -> Tensor:
        """A column's largest entry, or the largest share of the positions that do not list it."""
        n, listed, filler = len(self.ids), self.listed, self.filler(n_teacher)
        if keep is not None:
            listed, filler = listed & keep[:, None], torch.where(keep, filler, -torch.inf)
        nothing = filler.new_full((n_teacher,), -torch.inf)
        entries = nothing.scatter_reduce(0, self.ids[listed], self.entries[listed], "amax")
        # Rank positions by falling share. Of a column's sorted ranks 0, 1, .. the first one missing has its largest share.
        filler, order = filler.sort(descending=True)
        rank = torch.empty_like(order).scatter(0, order, torch.arange(n, device=order.device))
        keys = (self.ids * n + rank[:, None])[listed].sort().values
        column, rank = keys.div(max(n, 1), rounding_mode="floor"), keys.remainder(max(n, 1))
        count = torch.bincount(column, minlength=n_teacher)
        place = torch.arange(len(keys), device=keys.device) - (count.cumsum(0) - count)[column]
        missing = torch.zeros_like(count).index_add(0, column, (place == rank).long())
        return torch.maximum(entries, torch.cat([filler, nothing[:1]])[missing])

    def gather(self, n_teacher: int, columns: Tensor) -> Tensor:
        out = self.filler(n_teacher)[:, None].repeat(1, len(columns) + 1)  # the last column: entries outside J
        out.scatter_(1, self._places(n_teacher, columns), self.entries)
        return out[:, :-1].unflatten(0, self.shape)

    def rest(self, n_teacher: int, columns: Tensor, temperature: float) -> Tensor:
        outside = self.listed & (self._places(n_teacher, columns) == len(columns))
        entries = torch.where(outside, self.entries / temperature, -torch.inf)
        others = (n_teacher - len(columns) - outside.sum(1)).to(self.entries.dtype)
        shares = torch.where(others > 0, self.filler(n_teacher) / temperature + others.log(), -torch.inf)
        return torch.cat([entries, shares[:, None]], 1).logsumexp(1).view(self.shape)

    def _places(self, n_teacher: int, columns: Tensor) -> Tensor:
        """Where each entry stands in J, k for the others; [N_t, m]."""
        places = torch.full((n_teacher + 1,), len(columns), device=columns.device)
        places[columns] = torch.arange(len(columns), device=columns.device)
        return places[torch.where(self.listed, self.ids, n_teacher)]


_FORMS = {TeacherHead: _Head, TopK: _Listed}
