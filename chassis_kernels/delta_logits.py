"""Low-rank change of logits: logits[i, cols] += ((hidden_i - mean) U) V + bias, fused, with an adapter per row.

`delta_logits_` writes into the logits (inference); `delta_logits` returns new logits and has gradients (refinement).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from chassis_kernels import backends
from chassis_kernels.reference import delta_logits as reference
from chassis_kernels.reference.precision import compute_dtype, without_autocast

_ARGUMENTS = "Tensor hidden, Tensor U, Tensor V, Tensor? bias, Tensor? mean, Tensor? cols, Tensor? adapter_id"
_CPU_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def delta_logits_(
    logits: Tensor,  # [N, V] or [..., V]
    hidden: Tensor,  # [N, D] or [..., D]
    U: Tensor,  # [D, r] or [A, D, r]
    V: Tensor,  # [r, K] or [A, r, K]
    bias: Tensor | None = None,  # [K] or [A, K]
    *,
    mean: Tensor | None = None,  # [D] or [A, D]
    cols: Tensor | None = None,  # [K] or [A, K] int64, in the second form -1 = no column
    adapter_id: Tensor | None = None,  # [N] int64, -1 = leave the row alone
) -> Tensor:
    """Add a rank-r change to the logits in place and return them.

    logits[:, cols] += ((hidden - mean) @ U) @ V + bias; without `cols`, K = V columns. Repeated columns accumulate. With a
    leading dimension A on U, V, bias and mean, `adapter_id` picks the adapter of each row; `cols` may then be one list for
    all or one for each (`stack_adapters` makes such tensors of adapters of different ranks). N, K and r may be 0.
    Floating dtypes mix freely: hidden - mean, the products and the sum are float32 (float64 if an input is float64, on
    the reference backend), and the result is rounded once to the logits' dtype; subnormal bf16 counts as 0 where the
    processor multiplies bf16. Rows and columns that are not named keep their bits; a NaN stays where it is.

    Raises ValueError for shapes that do not fit, IndexError for an id out of range (on CPU, for the adapters in use; a GPU
    kernel skips such ids), RuntimeError where a gradient would be needed: use `delta_logits`.
    """
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in (logits, hidden, U, V, bias, mean)]):
        _refuse_grad(logits=logits, hidden=hidden, U=U, V=V, bias=bias, mean=mean)
    # Most calls are a decoding step of a few microseconds; what the kernel refuses is named or made contiguous below.
    if _OP_.direct(logits, hidden, U, V, bias, mean, cols, adapter_id):
        torch.autograd.graph.increment_version(logits)
        return logits
    rows, arguments = _checked(logits, hidden, U, V, bias, mean, cols, adapter_id)
    if 0 in rows.stride() and any(size > 1 and stride == 0 for size, stride in zip(rows.shape, rows.stride(), strict=True)):
        raise RuntimeError(f"logits of shape {tuple(logits.shape)} are expanded: rows share memory; clone them first")
    _OP_(rows, *arguments)
    if rows is not logits and not logits.is_contiguous() and not _flattens(logits):
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


def stack_adapters(
    U: Sequence[Tensor],  # [D, r_a] each
    V: Sequence[Tensor],  # [r_a, K_a]
    bias: Sequence[Tensor] | None = None,  # [K_a]
    mean: Sequence[Tensor] | None = None,  # [D]
    cols: Sequence[Tensor | None] | None = None,  # [K_a] int64; None: the first K_a columns
) -> dict[str, Tensor | None]:
    """Adapters of different ranks and columns as the stacked tensors that `delta_logits_` takes: {U, V, bias, mean, cols}.

    Shorter ones are filled up with zeros, lists of columns with -1, which changes no result. A list of
    columns that all share stays one list [K]. Raises ValueError for lists of
    different lengths.
    """
    lengths = {len(each) for each in (U, V, bias, mean, cols) if each is not None}
    if lengths != {len(U)} or not U:
        raise ValueError(f"lists of {sorted(lengths)} tensors: expected one of each for every adapter, and an adapter")
    rank, columns = max(u.shape[1] for u in U), max(v.shape[1] for v in V)
    if cols is not None or any(v.shape[1] != columns for v in V):
        own = [None] * len(V) if cols is None else cols
        own = [torch.arange(v.shape[1], device=v.device) if c is None else c for v, c in zip(V, own, strict=True)]
        shared = all(torch.equal(c, own[0]) for c in own)
        cols = own[0] if shared else torch.stack([pad(c, (0, columns - len(c)), value=-1) for c in own])
    return {
        "U": torch.stack([pad(u, (0, rank - u.shape[1])) for u in U]),
        "V": torch.stack([pad(v, (0, columns - v.shape[1], 0, rank - v.shape[0])) for v in V]),
        "bias": None if bias is None else torch.stack([pad(c, (0, columns - len(c))) for c in bias]),
        "mean": None if mean is None else torch.stack(list(mean)),
        "cols": cols,
    }


def _flattens(tensor: Tensor) -> bool:
    """Whether all dimensions but the last merge into one without a copy."""
    leading = [pair for pair in zip(tensor.shape, tensor.stride(), strict=True)][:-1]
    leading = [(size, stride) for size, stride in leading if size != 1]
    return all(outer == stride * size for (_, outer), (size, stride) in zip(leading, leading[1:], strict=False))


def _refuse_grad(**tensors: Tensor | None) -> None:
    names = [name for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad]
    raise RuntimeError(
        f"delta_logits_ writes in place and has no gradient, but {', '.join(names)} require grad: "
        "call delta_logits, or wrap the call in torch.no_grad()"
    )


def _checked(logits, hidden, U, V, bias, mean, cols, adapter_id) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Logits as [N, V] and the other arguments as the op takes them, after checking shapes against each other."""
    if U.dim() != V.dim() or U.dim() not in (2, 3):
        raise ValueError(f"U and V must both be 2-D, or both 3-D: got {tuple(U.shape)} and {tuple(V.shape)}")
    if logits.dim() != 2 or hidden.dim() != 2:
        *leading, vocabulary = logits.shape
        *rows, width = hidden.shape
        if leading != rows:
            raise ValueError(f"logits {tuple(logits.shape)} and hidden {tuple(hidden.shape)} differ in their rows")
        n = math.prod(leading)
        logits, hidden = logits.reshape(n, vocabulary), hidden.reshape(n, width)
    n, vocabulary = logits.shape
    *adapters, width, rank = U.shape
    columns = V.shape[-1]
    if hidden.shape != (n, width):
        _refuse_shape("hidden", hidden, (n, width))
    if V.shape != (*adapters, rank, columns):
        _refuse_shape("V", V, (*adapters, rank, columns))
    if bias is not None and bias.shape != (*adapters, columns):
        _refuse_shape("bias", bias, (*adapters, columns))
    if mean is not None and mean.shape != (*adapters, width):
        _refuse_shape("mean", mean, (*adapters, width))
    if cols is not None:
        expected = (*adapters, columns) if cols.dim() == 2 else (columns,)
        if cols.shape != expected:
            _refuse_shape("cols", cols, expected)
        _expect_int64("cols", cols)
    elif columns != vocabulary:
        raise ValueError(f"V has {columns} columns and the logits {vocabulary}: name the columns with cols")
    if adapter_id is not None:
        if not adapters or adapters[0] == 0:
            raise ValueError("adapter_id needs stacked adapters: U [A, D, r] and V [A, r, K]")
        adapter_id = adapter_id.reshape(-1)
        if adapter_id.shape != (n,):
            _refuse_shape("adapter_id", adapter_id, (n,))
        _expect_int64("adapter_id", adapter_id)
    elif adapters and adapters[0] != 1:
        raise ValueError(f"{adapters[0]} adapters need adapter_id, one id per row")
    return logits, (hidden, U, V, bias, mean, cols, adapter_id)


def _refuse_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def _expect_int64(name: str, ids: Tensor) -> None:
    if ids.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, not {ids.dtype}")


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])
    ctx.logits_dtype = inputs[0].dtype


def _backward(ctx, grad):
    if grad is None:
        return (None,) * 8
    grad_logits = grad.to(ctx.logits_dtype) if ctx.needs_input_grad[0] else None
    return grad_logits, *_gradients(grad, ctx.needs_input_grad[1:6], *ctx.saved_tensors), None, None


@without_autocast
def _gradients(grad, needed, hidden, U, V, bias, mean, cols, adapter_id) -> list[Tensor | None]:
    """Those needed of hidden, U, V, bias and mean, from the logits' gradient; a row without an adapter adds nothing."""
    for_hidden, for_U, for_V, for_bias, for_mean = needed
    if not any(needed):
        return [None] * 5
    dtype = compute_dtype(grad, hidden, U, V, bias, mean)
    grad_hidden = torch.zeros_like(hidden, dtype=dtype) if for_hidden else None
    each = []
    for u, v, m, own, rows in reference.adapters(U, V, mean, cols, adapter_id):
        u, v = u.to(dtype), v.to(dtype)
        mine = (grad if own is None else grad.index_select(1, own.clamp_min(0))).to(dtype)  # [N, K]
        kept = None if rows is None else rows[:, None]
        if own is not None and cols.dim() == 2:
            kept = own >= 0 if kept is None else kept & (own >= 0)
        mine = mine if kept is None else torch.where(kept, mine, 0.0)
        centred = hidden.to(dtype) if m is None else hidden.to(dtype) - m.to(dtype)
        inner = mine @ v.T  # [N, r]
        through = inner @ u.T if for_hidden or for_mean else None  # [N, D]
        if for_hidden:
            grad_hidden = grad_hidden + through
        each.append(
            (
                centred.T @ inner if for_U else None,
                (centred @ u).T @ mine if for_V else None,
                mine.sum(0) if for_bias else None,
                -through.sum(0) if for_mean else None,
            )
        )
    grads = [grad_hidden]
    for parts in zip(*each, strict=True):
        grads.append(None if parts[0] is None else torch.stack(parts) if U.dim() == 3 else parts[0])
    return [None if g is None else g.to(t.dtype) for g, t in zip(grads, (hidden, U, V, bias, mean), strict=True)]


def _cpu_(logits, *arguments) -> None:
    if not backends._C.delta_logits_(logits, *arguments):
        plain = [t if t is None else t.as_subclass(Tensor) for t in (logits, *arguments)]
        out, *rest = map(backends.rows_contiguous, plain)
        if not backends._C.delta_logits_(out, *rest):
            raise ValueError("chassis::delta_logits_: tensors that do not fit; chassis_kernels.delta_logits_ says which")
        if out is not plain[0]:
            logits.copy_(out)
    torch.autograd.graph.increment_version(logits)


def _cpu(logits, *arguments) -> Tensor:
    out = logits.clone()
    _cpu_(out, *arguments)
    return out


def _example(device: str) -> tuple:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 9), (3, 6), (2, 6, 2), (2, 2, 4), (2, 4), (2, 6))
    tensors = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    return *tensors, torch.tensor([8, 1, 1, 0], device=device), torch.tensor([1, -1, 0], device=device)


_OP_ = backends.register(
    f"delta_logits_(Tensor(a!) logits, {_ARGUMENTS}) -> ()",
    reference=reference.delta_logits_,
    fake=lambda *arguments: None,
    example=_example,
    cpu=backends.Implementation(_cpu_, _CPU_DTYPES, "x86-64"),
    triton=backends.triton_kernel("delta_logits", "delta_logits_"),
)
backends.register(
    f"delta_logits(Tensor logits, {_ARGUMENTS}) -> Tensor",
    reference=reference.delta_logits,
    fake=lambda logits, *arguments: torch.empty_like(logits),
    example=_example,
    cpu=backends.Implementation(_cpu, _CPU_DTYPES, "x86-64"),
    triton=backends.triton_kernel("delta_logits", "delta_logits"),
)
torch.library.register_autograd("chassis::delta_logits", _backward, setup_context=_setup_context, lib=backends.library)
