"""Linear centred kernel alignment of hidden states (Kornblith et al. 2019), exact on any number of rows.

    CKA(x, y) = ‖C‖²_F / (‖S_x‖_F ‖S_y‖_F)

Between 0 and 1; free of rotation, scale and shift of either side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from chassis_kernels import rows, state_file
from chassis_kernels.moments import Moments, add

FORMAT = {"format": "chassis.cka", "version": "1"}
Layers = Tensor | Sequence[Tensor]  # [N, D], or one such tensor per layer


class StreamingCKA:
    """CKA of every pair of layers, from batches of their hidden states.

    x are L layers [N, D_l] of one model and y M layers [N, D_m] of another, for the same N texts or positions; without y
    the layers of x are compared among themselves. Memory: float64, Σ D_l² + Σ D_m² + Σ D_l · Σ D_m, without y (Σ D_l)².
    """

    def __init__(self, widths_x: Sequence[int], widths_y: Sequence[int] = (), *, device: torch.device | str = "cpu") -> None:
        self.widths_x, self.widths_y = list(widths_x), list(widths_y)
        if self.widths_y:
            both = [(width, sum(self.widths_y)) for width in self.widths_x] + [(width, 0) for width in self.widths_y]
        else:
            both = [(sum(self.widths_x), 0)]
        self._moments = [Moments(*each, device=device) for each in both]

    def partial_fit(
        self,
        x: Layers,
        y: Layers = (),
        *,
        weight: Tensor | None = None,  # [N] >= 0
        mask: Tensor | None = None,  # [N] bool, False = leave the row out
        nan: str = "raise",
    ) -> StreamingCKA:
        """Add a batch of rows; errors as for `Moments.update`, changing nothing. `nan` looks at all layers together."""
        x, y = ([layers] if isinstance(layers, Tensor) else list(layers) for layers in (x, y))
        for name, layers, widths in (("x", x, self.widths_x), ("y", y, self.widths_y)):
            found = [layer.shape[-1] for layer in layers]
            if found != widths:
                raise ValueError(f"{name} has layers of widths {found}, expected {widths}")
        joint_x, joint_y = torch.cat(x, 1), torch.cat(y, 1) if y else None
        batch, kept = rows.checked(
            joint_x, joint_y, weight, mask, widths=(sum(self.widths_x), sum(self.widths_y)), device=self._moments[0].device
        )
        [(kept, dropped)] = rows.screened([batch], kept, nan)
        joint_x, joint_y, weight = batch
        pairs = [(layer, joint_y) for layer in x] + [(layer, None) for layer in y] if y else [(joint_x, None)]
        batches = [(layer.detach(), other, weight) for layer, other in pairs]
        add(self._moments, batches, [(kept, dropped)] * len(batches))
        return self

    @property
    def cka_(self) -> Tensor:
        """[L, M], without y [L, L]; float64. A layer that is constant has CKA 0."""
        if self._moments[0].rows == 0:
            raise ValueError("no rows have been seen: call partial_fit first")
        if self.widths_y:
            split = len(self.widths_x)
            own_x, own_y = ([m.S.norm() for m in part] for part in (self._moments[:split], self._moments[split:]))
            cross = [[C.norm() for C in m.C.split(self.widths_y, 1)] for m in self._moments[:split]]
        else:
            cross = [
                [block.norm() for block in part.split(self.widths_x, 1)] for part in self._moments[0].S.split(self.widths_x)
            ]
            own_x = own_y = [row[i] for i, row in enumerate(cross)]
        norms = torch.outer(torch.stack(own_x), torch.stack(own_y))
        cross = torch.stack([torch.stack(row) for row in cross])
        return torch.where(norms > 0, cross.square() / norms, 0.0)

    def merge(self, other: StreamingCKA) -> StreamingCKA:
        """Add the rows that `other` has seen."""
        if (self.widths_x, self.widths_y) != (other.widths_x, other.widths_y):
            raise ValueError(
                f"widths {self.widths_x}, {self.widths_y} and {other.widths_x}, {other.widths_y} do not go together"
            )
        for mine, theirs in zip(self._moments, other._moments, strict=True):
            mine.merge(theirs)
        return self

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> StreamingCKA:
        """Merge over the ranks of `group`; call it once. A rank may have seen no rows."""
        for moments in self._moments:
            moments.all_reduce(group)
        return self

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; an interrupted write leaves the file that was there."""
        state = {f"{k}.{name}": t for k, m in enumerate(self._moments) for name, t in m.state_dict().items()}
        widths = {"x": torch.tensor(self.widths_x), "y": torch.tensor(self.widths_y, dtype=torch.int64)}
        state_file.write(path, state | widths, FORMAT)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> StreamingCKA:
        """Read what `save` wrote; raises ValueError for any other file."""
        state, _ = state_file.read(path, FORMAT, device, what="StreamingCKA.save")
        cka = cls(state.pop("x").tolist(), state.pop("y").tolist(), device=device)
        for k, moments in enumerate(cka._moments):
            moments.load_state_dict({n.removeprefix(f"{k}."): t for n, t in state.items() if n.startswith(f"{k}.")})
        return cka


def linear_cka(x: Layers | Moments, y: Layers = ()) -> Tensor:
    """CKA of layers in memory, as for `StreamingCKA` [L, M]; of two tensors or of `Moments(..., full_y=True)` a number [].

    Raises ValueError for shapes that do not fit, for NaN and infinity, and for moments without full_y.
    """
    if isinstance(x, Moments):
        norms = x.S.norm() * x.Q.norm()
        return torch.where(norms > 0, x.C.norm().square() / norms, 0.0)
    single = isinstance(x, Tensor) and isinstance(y, Tensor)
    x, y = ([layers] if isinstance(layers, Tensor) else list(layers) for layers in (x, y))
    widths = ([layer.shape[-1] for layer in layers] for layers in (x, y))
    found = StreamingCKA(*widths, device=x[0].device).partial_fit(x, y).cka_
    return found[0, 0] if single else found
