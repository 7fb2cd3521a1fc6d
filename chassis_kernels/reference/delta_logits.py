"""logits[i, cols_a] += ((hidden_i - mean_a) U_a) V_a + bias_a with a = adapter_id[i], in eager PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from chassis_kernels.reference.precision import compute_dtype, without_autocast


@without_autocast
def delta_logits_(
    logits: Tensor,  # [N, V]
    hidden: Tensor,  # [N, D]
    U: Tensor,  # [D, r] or [A, D, r], and so on
    V: Tensor,  # [r, K]
    bias: Tensor | None,  # [K]
    mean: Tensor | None,  # [D]
    cols: Tensor | None,  # [K] or [A, K], there -1 = none
    adapter_id: Tensor | None,  # [N]
) -> None:
    """In place. Sums in float32 (float64 if an input is) and rounds once, also where `cols` repeats a column."""
    dtype = compute_dtype(logits, hidden, U, V, bias, mean)
    check_ids(adapter_id, U.shape[0], "adapter_id", lowest=-1)
    each = list(adapters(U, V, bias, mean, cols, adapter_id))
    for *_, own, mine in each:
        if mine is None or logits.is_cuda or mine.any():
            check_ids(own, logits.shape[1], "cols", lowest=0 if cols is None or cols.dim() == 1 else -1)
    for u, v, c, m, own, mine in each:
        rows = torch.arange(len(logits), device=logits.device) if mine is None else mine.nonzero().squeeze(1)
        centred = hidden[rows].to(dtype)
        if m is not None:
            centred = centred - m.to(dtype)
        delta = (centred @ u.to(dtype)) @ v.to(dtype)
        if c is not None:
            delta = delta + c.to(dtype)
        if own is None:
            logits[rows] = (logits[rows].to(dtype) + delta).to(logits.dtype)
        else:
            named = own >= 0
            distinct, position = own[named].unique(return_inverse=True)
            summed = delta.new_zeros(len(rows), len(distinct)).index_add_(1, position, delta[:, named])
            where = rows[:, None], distinct
            logits[where] = (logits[where].to(dtype) + summed).to(logits.dtype)


def adapters(*arguments: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """Yield each adapter's share of stacked tensors, and with it which rows are its own (None: all of them).

    Of stacked tensors those of one dimension, the columns, belong to all adapters.
    """
    *tensors, adapter_id = arguments
    if tensors[0].dim() == 2:
        yield *tensors, None
        return
    for a in range(tensors[0].shape[0]):
        shares = (t if t is None or t.dim() == 1 else t[a] for t in tensors)
        yield *shares, None if adapter_id is None else adapter_id == a


def delta_logits(logits: Tensor, *arguments: Tensor | None) -> Tensor:
    """The same into a new tensor."""
    out = logits.clone()
    delta_logits_(out, *arguments)
    return out


def check_ids(ids: Tensor | None, limit: int, name: str, lowest: int) -> None:
    """Raise IndexError if an id is outside [lowest, limit); on a GPU the read would stall the stream, so no check."""
    if ids is None or ids.numel() == 0 or ids.is_cuda:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < lowest or high >= limit:
        raise IndexError(f"{name} holds {low if low < lowest else high}: expected ids from {lowest} to {limit - 1}")
