"""Matrix products by torch with float32 results, whatever the dtypes of the factors."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

TILE = 4096  # rows and columns of a factor that are copied to float32 at a time


def product(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """left [m, k] right [k, n] into `out` [m, n] float32, or added to it.

    A product of two halves of one dtype on a GPU is summed in float32 by its tensor cores; else a narrower factor is copied
    to float32 a tile at a time.
    """
    if left.dtype == right.dtype == torch.float32:
        return torch.addmm(out, left, right, beta=int(add), out=out)
    if left.dtype == right.dtype and left.is_cuda:
        return torch.addmm(out, left, right, beta=int(add), out_dtype=torch.float32, out=out)
    if not add:
        out.zero_()
    for i, j in itertools.product(range(0, left.shape[1], TILE), range(0, right.shape[1], TILE)):
        depth, columns = slice(i, i + TILE), slice(j, j + TILE)
        part = out[:, columns]
        torch.addmm(part, left[:, depth].float(), right[depth, columns].float(), out=part)
    return out
