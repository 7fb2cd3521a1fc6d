"""logits[i, cols] += ((hidden_i - mean_a) U_a) V_a + bias_a with a = adapter_id[i], in eager PyTorch."""

from __future__ import annotations

from torch import Tensor

from chassis_kernels.reference.precision import compute_dtype, without_autocast


@without_autocast
def delta_logits_(
    logits: Tensor,  # [N, V]
    hidden: Tensor,  # [N, D]
    U: Tensor,  # [A, D, r]
    V: Tensor,  # [A, r, K]
    bias: Tensor | None,  # [A, K]
    mean: Tensor | None,  # [A, D]
    cols: Tensor | None,  # [K]
    adapter_id: Tensor | None,  # [N]
) -> None:
    """In place. Sums in float32 (float64 if an input is) and rounds once, also where `cols` repeats a column."""
    dtype = compute_dtype(logits, hidden, U, V, bias, mean)
    check_ids(cols, logits.shape[1], "cols", lowest=0)
    check_ids(adapter_id, U.shape[0], "adapter_id", lowest=-1)
    if cols is not None:
        cols, position = cols.unique(return_inverse=True)
    for a in range(U.shape[0]):
        rows = slice(None) if adapter_id is None else (adapter_id == a).nonzero().squeeze(1)
        centred = hidden[rows].to(dtype)
        if mean is not None:
            centred = centred - mean[a].to(dtype)
        delta = (centred @ U[a].to(dtype)) @ V[a].to(dtype)
        if bias is not None:
            delta = delta + bias[a].to(dtype)
        if cols is None:
            logits[rows] = (logits[rows].to(dtype) + delta).to(logits.dtype)
            continue
        summed = delta.new_zeros(delta.shape[0], len(cols)).index_add_(1, position, delta)
        where = (slice(None), cols) if adapter_id is None else (rows[:, None], cols)
        logits[where] = (logits[where].to(dtype) + summed).to(logits.dtype)


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
