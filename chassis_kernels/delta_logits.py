"""Low-rank change of logits: logits[i, cols] += ((hidden_i - mean) U) V + bias, fused, with an adapter per row.

`delta_logits_` writes into the logits (inference); `delta_logits` returns new logits and has gradients (refinement).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from chassis_kernels import backends
from chassis_kernels.reference import delta_logits as reference
from chassis_kernels.reference.precision import compute_dtype, without_autocast

_ARGUMENTS = "Tensor hidden, Tensor U, Tensor V, Tensor? bias, Tensor? mean, Tensor? cols, Tensor? adapter_id"


def delta_logits_(
    logits: Tensor,  # [N, V] or [..., V]
    hidden: Tensor,  # [N, D] or [..., D]
    U: Tensor,  # [D, r] or [A, D, r]
    V: Tensor,  # [r, K] or [A, r, K]
    bias: Tensor | None = None,  # [K] or [A, K]
    *,
    mean: Tensor | None = None,  # [D] or [A, D]
    cols: Tensor | None = None,  # [K] int64
    adapter_id: Tensor | None = None,  # [N] int64, -1 = leave the row alone
) -> Tensor:
    """Add a rank-r change to the logits in place and return them.

    logits[:, cols] += ((hidden - mean) @ U) @ V + bias; without `cols`, K = V columns. Repeated columns accumulate. With a
    leading dimension A on U, V, bias and mean, `adapter_id` picks the adapter of each row. N, K and r may be 0.
    Floating dtypes mix freely: hidden - mean, the products and the sum are float32 (float64 if an input is float64, on
    the reference backend), and the result is rounded once to the logits' dtype. Rows and columns that are not named keep
    their bits; a NaN stays where it is.

    Raises ValueError for shapes that do not fit, IndexError for an id out of range (on CPU; a GPU kernel skips such ids),
    RuntimeError where a gradient would be needed: use `delta_logits`.
    """
    if torch.is_grad_enabled():
        _refuse_grad(logits=logits, hidden=hidden, U=U, V=V, bias=bias, mean=mean)
    rows, arguments = _checked(logits, hidden, U, V, bias, mean, cols, adapter_id)
    if any(size > 1 and stride == 0 for size, stride in zip(rows.shape, rows.stride(), strict=True)):
        raise RuntimeError(f"logits of shape {tuple(logits.shape)} are expanded: rows share memory; clone them first")
    torch.ops.chassis.delta_logits_(rows, *arguments)
    if not _flattens(logits):
        logits.copy_(rows.view(logits.shape))
    return logits


def delta_logits(
    logits: Tensor,
    hidden: Tensor,
    U: Tensor,
    V: Tensor,
    bias: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    cols: Tensor | None = None,
    adapter_id: Tensor | None = None,
) -> Tensor:
    """`delta_logits_` into a new tensor, differentiable in logits, hidden, U, V, bias and mean (same shapes and errors)."""
    rows, arguments = _checked(logits, hidden, U, V, bias, mean, cols, adapter_id)
    return torch.ops.chassis.delta_logits(rows, *arguments).view(logits.shape)


def _flattens(tensor: Tensor) -> bool:
    """Whether all dimensions but the last merge into one without a copy."""
    leading = [pair for pair in zip(tensor.shape, tensor.stride(), strict=True)][:-1]
    leading = [(size, stride) for size, stride in leading if size != 1]
    return all(outer == stride * size for (_, outer), (size, stride) in zip(leading, leading[1:], strict=False))


def _refuse_grad(**tensors: Tensor | None) -> None:
    names = [name for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad]
    if names:
        raise RuntimeError(
            f"delta_logits_ writes in place and has no gradient, but {', '.join(names)} require grad: "
            "call delta_logits, or wrap the call in torch.no_grad()"
        )


def _checked(logits, hidden, U, V, bias, mean, cols, adapter_id) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Logits as [N, V] and the other arguments as the op takes them: rows flattened, adapters stacked."""
    if U.dim() == 2 and V.dim() == 2:
        if adapter_id is not None:
            raise ValueError("adapter_id needs stacked adapters: U [A, D, r] and V [A, r, K]")
        U, V = U.unsqueeze(0), V.unsqueeze(0)
        bias, mean = (t.unsqueeze(0) if t is not None and t.dim() == 1 else t for t in (bias, mean))
    elif U.dim() != 3 or V.dim() != 3:
        raise ValueError(f"U and V must both be 2-D, or both 3-D: got {tuple(U.shape)} and {tuple(V.shape)}")
    elif adapter_id is None and U.shape[0] != 1:
        raise ValueError(f"{U.shape[0]} adapters need adapter_id, one id per row")
    if logits.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(f"logits {tuple(logits.shape)} and hidden {tuple(hidden.shape)} differ in their rows")
    if logits.dim() != 2:
        n = math.prod(logits.shape[:-1])
        logits = logits.reshape(n, logits.shape[-1])
        hidden = hidden.reshape(n, hidden.shape[-1])
    (n, vocabulary), (adapters, width, rank), columns = logits.shape, U.shape, V.shape[2]
    _expect("hidden", hidden, (n, width))
    _expect("V", V, (adapters, rank, columns))
    _expect("bias", bias, (adapters, columns))
    _expect("mean", mean, (adapters, width))
    _expect("cols", cols, (columns,))
    if cols is None and columns != vocabulary:
        raise ValueError(f"V has {columns} columns and the logits {vocabulary}: name the columns with cols")
    if adapter_id is not None:
        adapter_id = adapter_id.reshape(-1)
        _expect("adapter_id", adapter_id, (n,))
    for name, ids in (("cols", cols), ("adapter_id", adapter_id)):
        if ids is not None and ids.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, not {ids.dtype}")
    return logits, (hidden, U, V, bias, mean, cols, adapter_id)


def _expect(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])
    ctx.logits_dtype = inputs[0].dtype


@without_autocast
def _gradients(grad, hidden, U, V, bias, mean, cols, adapter_id):
    """Gradients of hidden, U, V, bias and mean from that of the logits; a row without an adapter adds nothing."""
    dtype = compute_dtype(grad, hidden, U, V, bias, mean)
    G = (grad if cols is None else grad.index_select(1, cols)).to(dtype)  # [N, K]
    grad_hidden = torch.zeros_like(hidden, dtype=dtype)
    grads = []
    for a in range(U.shape[0]):
        u, v, mine = U[a].to(dtype), V[a].to(dtype), G
        if adapter_id is not None:
            mine = torch.where((adapter_id == a)[:, None], G, 0.0)
        centred = hidden.to(dtype) if mean is None else hidden.to(dtype) - mean[a].to(dtype)
        inner = mine @ v.T  # [N, r]
        through = inner @ u.T  # [N, D]
        grad_hidden = grad_hidden + through
        grads.append((centred.T @ inner, (centred @ u).T @ mine, mine.sum(0), -through.sum(0)))
    stacked = [torch.stack(each) for each in zip(*grads, strict=True)]
    return (
        grad_hidden.to(hidden.dtype),
        *(None if t is None else g.to(t.dtype) for g, t in zip(stacked, (U, V, bias, mean), strict=True)),
    )


def _backward(ctx, grad):
    if grad is None:
        return (None,) * 8
    if not any(ctx.needs_input_grad[1:]):
        return grad.to(ctx.logits_dtype), *(None,) * 7
    return grad.to(ctx.logits_dtype), *_gradients(grad, *ctx.saved_tensors), None, None


def _example(device: str) -> tuple:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 9), (3, 6), (2, 6, 2), (2, 2, 4), (2, 4), (2, 6))
    tensors = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    return *tensors, torch.tensor([8, 1, 1, 0], device=device), torch.tensor([1, -1, 0], device=device)


backends.register(
    f"delta_logits_(Tensor(a!) logits, {_ARGUMENTS}) -> ()",
    reference=reference.delta_logits_,
    fake=lambda *arguments: None,
    example=_example,
)
backends.register(
    f"delta_logits(Tensor logits, {_ARGUMENTS}) -> Tensor",
    reference=reference.delta_logits,
    fake=lambda logits, *arguments: torch.empty_like(logits),
    example=_example,
)
torch.library.register_autograd(
    "chassis::delta_logits", _backward, setup_context=_setup_context, lib=backends.library
)
