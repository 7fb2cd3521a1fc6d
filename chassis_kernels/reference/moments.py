"""Merging a batch into centred second moments, in eager PyTorch.

With n2 = sum_k w_k, m the batch's weighted mean, d = m - mean and f = n1 n2 / (n1 + n2) (Chan, Golub & LeVeque 1983):

    xx += triu((x - m)^T w (x - m) + f d_x^T d_x)    xy += (x - m_x)^T w (y - m_y) + f d_x^T d_y    yy likewise
"""

from __future__ import annotations

import torch
from torch import Tensor

from chassis_kernels.reference.precision import compute_dtype, without_autocast


def moments_update_(*columns: list[Tensor]) -> None:
    """In place, one layer after the other; for what no layer has, the list is empty. The arguments of `update_layer`."""
    columns = tuple(column or [None] * len(columns[0]) for column in columns)
    for layer in zip(*columns, strict=True):
        update_layer(*layer)


@without_autocast
def update_layer(
    count: Tensor,  # [] float64
    mean_x: Tensor,  # [D] float64
    xx: Tensor,  # [D, D] float64, upper triangle
    mean_y: Tensor | None,  # [T] float64
    xy: Tensor | None,  # [D, T] float64
    yy: Tensor | None,  # [T] float64, or [T, T] upper triangle
    x: Tensor,  # [N, D]
    y: Tensor | None,  # [N, T]
    weight: Tensor | None,  # [N], a row of weight 0 is not read
) -> None:
    """In place. Centres and multiplies in float32 (float64 if x or y is), merges in float64."""
    dtype = compute_dtype(x, y)
    if weight is None:
        weight = torch.ones(len(x), dtype=dtype, device=x.device)
    else:
        kept = weight != 0
        x, y, weight = x[kept], None if y is None else y[kept], weight[kept].to(dtype)
    batch = weight.sum(dtype=torch.float64)
    if len(x) == 0:
        return
    total = count + batch
    factor = count * batch / total

    def centred(rows: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        own = (weight.double() @ rows.double()) / batch
        return rows.to(dtype) - own.to(dtype), own - mean

    def product(a: Tensor, b: Tensor, shift_a: Tensor, shift_b: Tensor) -> Tensor:
        return ((a * weight[:, None]).T @ b).double() + factor * torch.outer(shift_a, shift_b)

    x, shift_x = centred(x, mean_x)
    xx += product(x, x, shift_x, shift_x).triu()
    mean_x += shift_x * (batch / total)
    if y is not None:
        y, shift_y = centred(y, mean_y)
        xy += product(x, y, shift_x, shift_y)
        if yy.dim() == 2:
            yy += product(y, y, shift_y, shift_y).triu()
        else:
            yy += (y.double().square() * weight.double()[:, None]).sum(0) + factor * shift_y.square()
        mean_y += shift_y * (batch / total)
    count += batch
