"""Streaming moments: count, means and centred products of paired rows, exact for any batch split, mergeable.

    S = Σ w (x-m_x)ᵀ(x-m_x)    C = Σ w (x-m_x)ᵀ(y-m_y)    q_j = Σ w (y_j-m_yj)²    m = Σ w x / Σ w

Each batch is centred with its own mean and multiplied in float32 (float64 rows: float64), then merged in float64 by the
pairwise update of Chan, Golub & LeVeque (1983). Only one triangle of S is computed. Small batches wait, as copies, until
some of them are worth a merge (`rows.PENDING_ROWS` rows or `rows.PENDING_BYTES` bytes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from chassis_kernels import backends, rows, state_file
from chassis_kernels.reference import moments as reference

FORMAT = {"format": "chassis.moments", "version": "1"}
_STATE = ("count", "mean_x", "xx", "mean_y", "xy", "yy")
_PENDING = ("pending_x", "pending_y", "pending_weight")


def _merged(name: str, doc: str) -> property:
    return property(lambda self: self.flush()._state[name], doc=doc)


class Moments:
    """Streamed moments of rows x [N, D] and, with `dim_y` > 0, y [N, T]; float64 tensors on `device`.

    `full_y=True` keeps all of Σ w (y-m_y)ᵀ(y-m_y), not its diagonal alone. `rows` counts the rows seen, unweighted;
    `dropped` those that `nan="drop"` left out.
    """

    count = _merged("count", "Sum of the weights, [].")
    mean_x = _merged("mean_x", "Weighted mean of x, [D].")
    xx = _merged("xx", "Upper triangle of S, zeros below, [D, D].")
    mean_y = _merged("mean_y", "Weighted mean of y, [T].")
    xy = _merged("xy", "C, [D, T].")
    yy = _merged("yy", "q, [T]; with full_y the upper triangle of Σ w (y-m_y)ᵀ(y-m_y), [T, T].")

    @torch.inference_mode(False)  # made under inference mode, the moments must still be updatable outside
    def __init__(self, dim_x: int, dim_y: int = 0, *, full_y: bool = False, device: torch.device | str = "cpu") -> None:
        if dim_x < 1 or dim_y < 0:
            raise ValueError(f"dim_x {dim_x}, dim_y {dim_y}: expected at least one column of x and none or more of y")
        self.dim_x, self.dim_y, self.full_y, self.device = dim_x, dim_y, full_y, torch.device(device)
        self.rows = self.dropped = 0
        shapes = ((), (dim_x,), (dim_x, dim_x), (dim_y,), (dim_x, dim_y), (dim_y, dim_y) if full_y else (dim_y,))
        self._state = {
            name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in zip(_STATE, shapes, strict=True)
        }
        self._waiting = rows.Waiting()

    def __repr__(self) -> str:
        return f"Moments(dim_x={self.dim_x}, dim_y={self.dim_y}, full_y={self.full_y}, rows={self.rows})"

    @property
    def S(self) -> Tensor:
        """Σ w (x-m_x)ᵀ(x-m_x), symmetric, [D, D] (a new tensor)."""
        return _mirrored(self.xx)

    @property
    def C(self) -> Tensor:
        """Σ w (x-m_x)ᵀ(y-m_y), [D, T]."""
        return self.xy

    @property
    def Q(self) -> Tensor:
        """Σ w (y-m_y)ᵀ(y-m_y), symmetric, [T, T] (a new tensor); needs full_y."""
        if not self.full_y:
            raise ValueError("only the diagonal of YᵀY was kept (.q): make the moments with full_y=True")
        return _mirrored(self.yy)

    @property
    def q(self) -> Tensor:
        """Σ w (y_j-m_yj)², [T]."""
        return self.yy.diagonal() if self.full_y else self.yy

    @property
    def covariance(self) -> Tensor:
        """S / count, [D, D]."""
        return self.S / self.count

    def update(
        self,
        x: Tensor,  # [N, D] float
        y: Tensor | None = None,  # [N, T] float
        *,
        weight: Tensor | None = None,  # [N] >= 0
        mask: Tensor | None = None,  # [N] bool, False = leave the row out, whatever it holds
        nan: str = "raise",
    ) -> Moments:
        """Add a batch of rows and return self.

        Rows with a NaN or an infinity raise ValueError, or are left out and counted in `dropped` with `nan="drop"`. After
        any error the moments are what they were. Raises ValueError for shapes, dtypes, devices or weights that do not fit.
        """
        update_layers([self], [x], y, weight=weight, mask=mask, nan=nan)
        return self

    def flush(self) -> Moments:
        """Merge the rows that wait. Reading a moment does it; it may move the last digits of what follows."""
        for batch in self._waiting.taken():
            _merge([(self, batch)])
        return self

    def merge(self, other: Moments) -> Moments:
        """Add the rows that `other` has seen, in place."""
        return self._combine(other, 1)

    def subtract(self, other: Moments) -> Moments:
        """Remove the rows that `other` has seen, in place: the inverse of `merge`, to rounding."""
        left = float(self.count) - float(other.count)
        if other.rows > self.rows or left < -1e-9 * float(self.count):
            raise ValueError(
                f"cannot take {other.rows} rows of weight {float(other.count):g} from {self.rows} rows of weight "
                f"{float(self.count):g}: they were never merged in"
            )
        return self._combine(other, -1)

    def copy(self) -> Moments:
        """Independent moments with the same content."""
        new = Moments(self.dim_x, self.dim_y, full_y=self.full_y, device=self.device)
        for name, tensor in new._state.items():
            tensor.copy_(self._state[name])
        if self._waiting.n:
            new._waiting.add(self._waiting.batch())
        new.rows, new.dropped = self.rows, self.dropped
        return new

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> Moments:
        """Merge over the ranks of `group`, in place: every rank then holds the moments of all rows. Call it once.

        Two rounds: the counts and weighted means, then the products shifted to the common mean. A rank may be empty.
        """
        from torch import distributed

        state = self.flush()._state
        n = float(state["count"])
        integers = torch.tensor([self.rows, self.dropped], device=self.device)
        sums = torch.cat([state["count"].view(1), n * state["mean_x"], n * state["mean_y"]])
        distributed.all_reduce(integers, group=group)
        distributed.all_reduce(sums, group=group)
        if float(sums[0]) == 0:
            return self
        common_x, common_y = (sums[1:] / sums[0]).split([self.dim_x, self.dim_y])
        self._add_outer(state["mean_x"] - common_x, state["mean_y"] - common_y, n)
        for name in ("xx", "xy", "yy"):
            distributed.all_reduce(state[name], group=group)
        state["count"].copy_(sums[0]), state["mean_x"].copy_(common_x), state["mean_y"].copy_(common_y)
        self.rows, self.dropped = integers.tolist()
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on bit for bit, waiting rows included. Live tensors: clone what must not change."""
        numbers = {"rows": torch.tensor(self.rows), "dropped": torch.tensor(self.dropped)}
        waiting = dict(zip(_PENDING, self._waiting.batch(), strict=True)) if self._waiting.n else {}
        return self._state | numbers | {name: tensor for name, tensor in waiting.items() if tensor is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a `state_dict` of moments of the same shape; raises ValueError, changing nothing, if it is another."""
        expected = set(_STATE) | {"rows", "dropped"}
        if not expected <= set(state) <= expected | set(_PENDING):
            raise ValueError(f"not a state of Moments: it holds {sorted(state)}, expected {sorted(expected)}")
        for name, mine in self._state.items():
            if state[name].shape != mine.shape or state[name].dtype != mine.dtype:
                raise ValueError(
                    f"{name} is {state[name].dtype} {tuple(state[name].shape)}, expected {mine.dtype} {tuple(mine.shape)}: "
                    "the state was saved from moments of other dimensions"
                )
        waiting = rows.Waiting()
        if "pending_x" in state:
            x, y, weight = (state[name].to(self.device) if name in state else None for name in _PENDING)
            widths = self.dim_x, self.dim_y
            waiting.add(rows.checked(x, y, weight, None, widths=widths, device=self.device)[0])
        self._waiting = waiting
        for name, mine in self._state.items():
            mine.copy_(state[name])
        self.rows, self.dropped = int(state["rows"]), int(state["dropped"])

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; an interrupted write leaves the file that was there."""
        state_file.write(path, self.state_dict(), FORMAT | {"full_y": str(int(self.full_y))})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Moments:
        """Read what `save` wrote; raises ValueError for any other file."""
        state, metadata = state_file.read(path, FORMAT, device, what="Moments.save")
        if not {"mean_x", "mean_y"} <= set(state):
            raise ValueError(f"{path} holds {sorted(state)}: it was not written by this version of Moments.save")
        full_y = metadata.get("full_y") == "1"
        moments = cls(len(state["mean_x"]), len(state["mean_y"]), full_y=full_y, device=device)
        moments.load_state_dict(state)
        return moments

    def _due(self, batch: rows.Batch, kept: Tensor | None, zeroed: rows.Batch) -> Iterator[rows.Batch]:
        """Take a batch in; yields what is then to be merged, each before the next is asked for."""
        n_rows = len(batch[0]) if kept is None else int(kept.sum())
        self.rows += n_rows
        if n_rows >= rows.capacity(batch):
            yield from self._waiting.taken()
            yield zeroed
        elif n_rows:
            batch = rows.selected(batch, kept)
            if not self._waiting.fits(batch):
                yield from self._waiting.taken()
            self._waiting.add(batch)
            if self._waiting.full:
                yield from self._waiting.taken()

    def _combine(self, other: Moments, sign: int) -> Moments:
        shapes = [(m.dim_x, m.dim_y, m.full_y) for m in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"moments with (dim_x, dim_y, full_y) = {shapes[0]} and {shapes[1]} do not go together")
        mine, theirs = self.flush()._state, other.flush()._state
        n1, n2 = float(mine["count"]), sign * float(theirs["count"])
        self.rows += sign * other.rows
        self.dropped += sign * other.dropped
        n = n1 + n2
        if n2 == 0:
            return self
        if n <= 1e-9 * n1:
            for tensor in mine.values():
                tensor.zero_()
            return self
        shift_x, shift_y = (theirs[name].to(self.device) - mine[name] for name in ("mean_x", "mean_y"))
        for name in ("xx", "xy", "yy"):
            mine[name].add_(theirs[name].to(self.device), alpha=sign)
        self._add_outer(shift_x, shift_y, n1 * n2 / n)
        mine["mean_x"].add_(shift_x, alpha=n2 / n)
        mine["mean_y"].add_(shift_y, alpha=n2 / n)
        mine["count"].fill_(n)
        return self

    def _add_outer(self, dx: Tensor, dy: Tensor, factor: float) -> None:
        """Add factor * [dx, dy]ᵀ[dx, dy] to the products."""
        self._state["xx"].addr_(dx, dx, alpha=factor).triu_()
        self._state["xy"].addr_(dx, dy, alpha=factor)
        if self.full_y:
            self._state["yy"].addr_(dy, dy, alpha=factor).triu_()
        else:
            self._state["yy"].addcmul_(dy, dy, value=factor)


def update_layers(
    layers: Sequence[Moments],
    x: Sequence[Tensor],  # of each layer [N, D], floats
    y: Tensor | Sequence[Tensor] | None = None,  # [N, T], of all layers or of each
    *,
    weight: Tensor | None = None,  # [N] >= 0
    mask: Tensor | None = None,  # [N] bool
    nan: str = "raise",
) -> None:
    """`Moments.update` of several moments with the same N rows, the layers of a model say: the same bits, sooner.

    The layers' tiles share the threads, and y, weight and mask are read once for all. With nan="drop" a row is left out
    where its x or y is bad. After any error all the moments are what they were. Raises ValueError as `Moments.update` does.
    """
    batches, kept = _checked(layers, x, y, weight, mask)
    add(layers, batches, rows.screened(batches, kept, nan))


def add(layers: Sequence[Moments], batches: Sequence[rows.Batch], screened: Sequence[tuple[Tensor | None, int]]) -> None:
    """Take in batches that are checked: `screened` says which rows count and how many were dropped."""
    kept = [own for own, _ in screened]
    zeroed = rows.zero_weighted(batches, kept)
    for step in zip_longest(*(m._due(*given) for m, *given in zip(layers, batches, kept, zeroed, strict=True))):
        _merge([(m, batch) for m, batch in zip(layers, step, strict=True) if batch is not None])
    for moments, (_, dropped) in zip(layers, screened, strict=True):
        moments.dropped += dropped


def moments_update_(
    moments: Moments | Sequence[Moments],
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor] | None = None,
    *,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Moments | Sequence[Moments]:
    """One call of the op chassis::moments_update_: merge the batch now, without looking for NaN (see `Moments.update`).

    Lists of moments and of x are one call for several layers, as in `update_layers`.
    """
    layers, x = ([moments], [x]) if isinstance(moments, Moments) else (moments, x)
    batches, kept = _checked(layers, x, y, weight, mask)
    for layer in layers:
        layer.flush()
        layer.rows += len(x[0]) if kept is None else int(kept.sum())
    _merge(list(zip(layers, rows.zero_weighted(batches, [kept] * len(layers)), strict=True)))
    return moments


def _checked(layers, x, y, weight, mask) -> tuple[list[rows.Batch], Tensor | None]:
    y = [y] * len(layers) if y is None or isinstance(y, Tensor) else y
    if not 0 < len(layers) == len(x) == len(y) or len({id(moments) for moments in layers}) < len(layers):
        raise ValueError(f"{len(layers)} moments, {len(x)} x, {len(y)} y: expected distinct moments, an x and a y for each")
    widths = [(moments.dim_x, moments.dim_y) for moments in layers]
    return rows.checked_layers(x, y, weight, mask, widths=widths, device=layers[0].device)


def _merge(pairs: Sequence[tuple[Moments, rows.Batch]]) -> None:
    """Merge a batch into each of some moments: one call for those with the same dtypes and weights or none."""
    calls: dict[tuple, list[tuple]] = {}
    for moments, (x, y, weight) in pairs:
        kind = x.dtype, None if y is None else y.dtype, weight is None
        calls.setdefault(kind, []).append((*moments._state.values(), x, y, weight))
    for (_, y, unweighted), sets in calls.items():
        absent = (*_STATE[3:], "y") * (y is None) + ("weight",) * unweighted
        columns = zip((*_STATE, "x", "y", "weight"), zip(*sets, strict=True), strict=True)
        torch.ops.chassis.moments_update_(*([] if name in absent else list(column) for name, column in columns))


def _mirrored(upper: Tensor) -> Tensor:
    return upper + upper.triu(1).T


def _cpu(*columns: list[Tensor]) -> None:
    count, *state, x, y, weight = (column or [None] * len(columns[0]) for column in columns)
    weight = rows.once_each(lambda w: w.to(torch.float32).contiguous(), weight)
    x, y = (rows.once_each(backends.rows_contiguous, batch) for batch in (x, y))
    layers = zip([n.view(1) for n in count], *state, x, y, weight, strict=True)
    backends._C.moments_update([tuple(backends.matrix_args(tensor) for tensor in layer) for layer in layers])


def _example(device: str) -> tuple:
    """Two layers with the same y."""
    generator = torch.Generator().manual_seed(0)
    x, other, y, weight = (torch.rand(shape, generator=generator).to(device) for shape in ((5, 3), (5, 3), (5, 2), (5,)))
    sets = ((*Moments(3, 2, device=device)._state.values(), own, y, weight) for own in (x, other))
    return tuple(map(list, zip(*sets, strict=True)))


backends.register(
    "moments_update_(Tensor(a!)[] count, Tensor(b!)[] mean_x, Tensor(c!)[] xx, Tensor(d!)[] mean_y, Tensor(e!)[] xy, "
    "Tensor(f!)[] yy, Tensor[] x, Tensor[] y, Tensor[] weight) -> ()",
    reference=reference.moments_update_,
    fake=lambda *arguments: None,
    example=_example,
    inputs=slice(6, 8),
    cpu=backends.Implementation(
        _cpu,
        frozenset({torch.float32, torch.bfloat16, torch.float16}),
        "portable, AVX2 and AVX-512 by tests/test_moments.py",
    ),
    triton=backends.triton_kernel("moments", "moments_update_"),
)
