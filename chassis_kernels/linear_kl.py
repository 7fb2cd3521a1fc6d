"""KL between two softmaxes whose logits are linear in hidden states, without ever holding the [N, V] logits.

Evaluation and refinement of an adapter: KL(expert || adapted base) per row, and gradients for the adapter's factors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from chassis_kernels import backends, pages
from chassis_kernels.reference import linear_kl as reference

KEPT_ROWS = 288  # whose exponentials exist together where gradients are made with the KL
TILE = 128  # columns, as in csrc/cpu/linear_kl_logits.h

_INPUTS = (
    "Tensor h_a, Tensor W_a, Tensor h_b, Tensor? W_b, Tensor? bias_a, Tensor? bias_b, Tensor? u, Tensor? v, Tensor? c, "
    "float? softcap_a, float? softcap_b, float scale_a, float scale_b"
)

_STATS_DTYPES = (torch.float64, torch.float64, torch.int64, torch.int64)
_CPU_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


class Delta(NamedTuple):
    """A low-rank change u v + c of the logits a, added before scale and softcap."""

    u: Tensor  # [N, r], for an adapter (hidden - mean) @ U
    v: Tensor  # [r, V]
    c: Tensor | None = None  # [V]


class LinearKLStats(NamedTuple):
    """What the same pass over the vocabulary also knows; no gradients."""

    lse_a: Tensor  # [N] float64, nats
    lse_b: Tensor  # [N] float64, nats
    argmax_a: Tensor  # [N] int64, the lowest id among ties
    argmax_b: Tensor  # [N] int64


def linear_kl(
    h_a: Tensor,  # [N, D]
    W_a: Tensor,  # [V, D]
    h_b: Tensor,  # [N, E], or [N, V] logits
    W_b: Tensor | None,  # [V, E]
    *,
    bias_a: Tensor | None = None,  # [V]
    bias_b: Tensor | None = None,  # [V]
    delta: Delta | None = None,
    softcap_a: float | None = None,
    softcap_b: float | None = None,
    scale_a: float = 1.0,
    scale_b: float = 1.0,
    stats: bool = False,
) -> Tensor | tuple[Tensor, LinearKLStats]:
    """KL(softmax(b) || softmax(a)) per row, [N], in nats; with `stats`, also LinearKLStats.

    a = cap_a(scale_a (h_a W_aᵀ + bias_a + u v + c)) and b = cap_b(scale_b (h_b W_bᵀ + bias_b)), cap(z) = s tanh(z / s);
    without W_b, h_b is the logits b itself. Logits may be -inf: p_b = 0 adds nothing, p_a = 0 < p_b gives +inf; a row
    with NaN or without any finite logit gives NaN. The result is float32 (float64 if an input is, on the reference
    backend), unclamped: two equal distributions may give -1e-7. Differentiable in delta's u, v and c alone.

    On the CPU the gradients are made in the same pass as the KL and held until backward: [N, r], [r, V] and [V] in float32,
    and meanwhile what 288 rows of both sides need, in memory that stays for the next call (`pages.release`). Where the
    upstream gradient differs from row to row (a sum or mean gives every row the same), those for v and c take a second pass.

    Raises ValueError for shapes that do not fit and RuntimeError where a hidden state, W or bias requires grad.
    """
    u, v, c = delta if delta is not None else (None, None, None)
    if torch.is_grad_enabled():
        _refuse_grad(h_a=h_a, W_a=W_a, h_b=h_b, W_b=W_b, bias_a=bias_a, bias_b=bias_b)
    _check(h_a, W_a, h_b, W_b, bias_a, bias_b, u, v, c)
    for name, value in (("softcap_a", softcap_a), ("softcap_b", softcap_b)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}: a softcap is positive, or None for no cap")
    if W_b is None and (bias_b is not None or softcap_b is not None or scale_b != 1.0):
        raise ValueError("without W_b, h_b is the logits themselves: bias_b, softcap_b and scale_b do not apply")
    inputs = h_a, W_a, h_b, W_b, bias_a, bias_b, u, v, c, softcap_a, softcap_b, scale_a, scale_b
    kl, *rest = _OnePass.apply(*inputs) if _one_pass(inputs) else torch.ops.chassis.linear_kl(*inputs)
    return (kl, LinearKLStats(*(t.detach() for t in rest))) if stats else kl


def mean_probabilities(
    h: Tensor,  # [N, E]
    W: Tensor,  # [V, E]
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The mean softmax probability per token over the rows, [V] float64: the diagonal of the output metric.

    softmax(cap(scale (h Wᵀ + bias))) in chunks of rows. Raises ValueError for no rows or shapes that do not fit.
    """
    if h.dim() != 2 or h.shape[0] == 0:
        raise ValueError(f"h has shape {tuple(h.shape)}: expected [N, E] with at least one row")
    _expect("W", W, (W.shape[0], h.shape[1]))
    _expect("bias", bias, (W.shape[0],))
    return reference.mean_probabilities(h, W, bias, softcap, scale)


def _refuse_grad(**tensors: Tensor | None) -> None:
    names = [name for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad]
    if names:
        raise RuntimeError(
            f"linear_kl has gradients for delta's factors only, but {', '.join(names)} require grad: detach them"
        )


def _check(h_a, W_a, h_b, W_b, bias_a, bias_b, u, v, c) -> None:
    if h_a.dim() != 2 or W_a.dim() != 2 or W_a.shape[0] == 0:
        raise ValueError(f"h_a [N, D] and W_a [V > 0, D] are wanted: got {tuple(h_a.shape)} and {tuple(W_a.shape)}")
    (n, width), vocabulary = h_a.shape, W_a.shape[0]
    _expect("W_a", W_a, (vocabulary, width))
    if h_b.dim() != 2:
        raise ValueError(f"h_b must be 2-D: got {tuple(h_b.shape)}")
    _expect("h_b", h_b, (n, vocabulary if W_b is None else h_b.shape[1]))
    _expect("W_b", W_b, (vocabulary, h_b.shape[1]))
    _expect("bias_a", bias_a, (vocabulary,))
    _expect("bias_b", bias_b, (vocabulary,))
    if u is not None:
        if u.dim() != 2:
            raise ValueError(f"delta.u must be [N, r]: got {tuple(u.shape)}")
        _expect("delta.u", u, (n, u.shape[1]))
        _expect("delta.v", v, (u.shape[1], vocabulary))
        _expect("delta.c", c, (vocabulary,))


def _expect(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def _one_pass(inputs: tuple) -> bool:
    """Whether the gradients are made together with the KL: for the C++ kernel, whose block of logits they need, and where
    backward can look at the upstream gradient."""
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and backends.ordinary(tensors)
    return wanted and backends.select("linear_kl", tensors[0].device.type, tuple(t.dtype for t in tensors)) == "cpu"


class _OnePass(torch.autograd.Function):
    """The KL and, in the same pass, the gradients of its sum.

    Backward scales them where the upstream gradient is the same for every row, as that of a sum or mean; otherwise it makes
    them again, unless u's are all it needs."""

    @staticmethod
    def forward(ctx, *inputs):
        needs = list(ctx.needs_input_grad[6:9])
        *output, grad_u, grad_v, grad_c = torch.ops.chassis.linear_kl_with_gradients(*inputs, needs)
        _setup_context(ctx, inputs, output, (grad_u, grad_v, grad_c))
        ctx.mark_non_differentiable(*output[1:])
        return tuple(output)

    @staticmethod
    def backward(ctx, grad, *_):
        needs = ctx.needs_input_grad[6:9]
        by_row = not (needs[1] or needs[2])
        if torch.is_grad_enabled() or not (by_row or (len(grad) and bool((grad == grad[0]).all()))):
            return _backward(ctx, grad)
        scaled = []
        for made, tensor, need in zip(ctx.saved_tensors[-3:], ctx.saved_tensors[6:9], needs, strict=True):
            factor = grad[:, None] if len(scaled) == 0 else grad[0]
            scaled.append((made * factor).to(tensor.dtype) if need else None)
        return *(None,) * 6, *scaled, *(None,) * 4


def _setup_context(ctx, inputs, output, grads=()):
    *tensors, ctx.softcap_a, ctx.softcap_b, ctx.scale_a, ctx.scale_b = inputs
    _, lse_a, lse_b, *_ = output
    ctx.save_for_backward(*tensors, lse_a, lse_b, *grads)


def _backward(ctx, grad, *_):
    *tensors, lse_a, lse_b = ctx.saved_tensors[:11]
    options = ctx.softcap_a, ctx.softcap_b, ctx.scale_a, ctx.scale_b
    if grad is None or tensors[6] is None:
        return (None,) * 13
    grad_u, grad_v, grad_c = torch.ops.chassis.linear_kl_backward(grad, *tensors, *options, lse_a, lse_b)
    return *(None,) * 6, grad_u, grad_v, None if tensors[8] is None else grad_c, *(None,) * 4


def _fake(h_a, *arguments):
    tensors = [t for t in (h_a, *arguments) if isinstance(t, Tensor)]
    dtype = reference.compute_dtype(*tensors)
    n = h_a.shape[0]
    return tuple(h_a.new_empty(n, dtype=d) for d in (dtype, *_STATS_DTYPES))


def _fake_backward(grad, h_a, W_a, h_b, W_b, bias_a, bias_b, u, v, c, *options):
    return u.new_empty(u.shape), v.new_empty(v.shape), v.new_empty(0) if c is None else c.new_empty(c.shape)


def _fake_with_gradients(*inputs):
    *inputs, needs = inputs
    return *_fake(*inputs), *_gradients(inputs, needs)


def _gradients(inputs, needs) -> list[Tensor]:
    """Zeroed room for the gradients that are wanted."""
    dtype = reference.compute_dtype(*(t for t in inputs if isinstance(t, Tensor)))
    shapes = (t.shape if need else (0,) for t, need in zip(inputs[6:9], needs, strict=True))
    return [inputs[0].new_zeros(shape, dtype=dtype) for shape in shapes]


def _cpu_args(inputs) -> tuple[list[Tensor | None], tuple]:
    """The inputs as the extension takes them, and the tensors behind the addresses: to be kept until it returns."""
    *tensors, softcap_a, softcap_b, scale_a, scale_b = inputs
    kept = [backends.rows_contiguous(t) for t in tensors]
    return kept, (*map(backends.matrix_args, kept), softcap_a or 0.0, softcap_b or 0.0, scale_a, scale_b)


def _cpu(*inputs, grads=(None, None, None), room=None):
    kept, arguments = _cpu_args(inputs)
    out = tuple(kept[0].new_empty(len(kept[0]), dtype=d) for d in (torch.float32, *_STATS_DTYPES))
    backends._C.linear_kl(arguments, tuple(map(_address, out)), tuple(map(_address, grads)), backends.matrix_args(room))
    return out


def _cpu_with_gradients(*inputs):
    *inputs, needs = inputs
    grads = _gradients(inputs, needs)
    n, vocabulary = len(inputs[0]), len(inputs[1])
    room = pages.empty((min(n, KEPT_ROWS), 2 * TILE * -(-vocabulary // TILE)), torch.float32)
    out = _cpu(*inputs, grads=[grad if need else None for grad, need in zip(grads, needs, strict=True)], room=room)
    return *out, *grads


def _cpu_backward(grad, *inputs):
    *inputs, lse_a, lse_b = inputs
    grad, lse_a, lse_b = grad.float().contiguous(), lse_a.contiguous(), lse_b.contiguous()
    needs = [True, True, inputs[8] is not None]
    kept, arguments = _cpu_args(inputs)
    grads = _gradients(inputs, needs)
    upstream = (t.data_ptr() for t in (grad, lse_a, lse_b))
    backends._C.linear_kl_backward(arguments, *upstream, tuple(map(_address, grads)))
    return tuple(made if t is None else made.to(t.dtype) for made, t in zip(grads, inputs[6:9], strict=True))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _example(device: str) -> tuple:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 5), (7, 5), (3, 4), (7, 4), (7,), (7,), (3, 2), (2, 7), (7,))
    return *(torch.randn(shape, generator=generator).to(device) for shape in shapes), 20.0, None, 1.0, 0.5


def _example_with_gradients(device: str) -> tuple:
    return *_example(device), [True, True, True]


def _example_backward(device: str) -> tuple:
    inputs = _example(device)
    _, lse_a, lse_b, *_ = reference.linear_kl(*inputs)
    return torch.ones(3, device=device), *inputs, lse_a, lse_b


backends.register(
    f"linear_kl({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.linear_kl,
    fake=_fake,
    example=_example,
    cpu=backends.Implementation(_cpu, _CPU_DTYPES, "x86-64"),
    triton=backends.triton_kernel("linear_kl", "linear_kl"),
    inputs=slice(0, 9),
)
backends.register(
    f"linear_kl_with_gradients({_INPUTS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.linear_kl_with_gradients,
    fake=_fake_with_gradients,
    example=_example_with_gradients,
    cpu=backends.Implementation(_cpu_with_gradients, _CPU_DTYPES, "x86-64"),
    inputs=slice(0, 9),
)
backends.register(
    f"linear_kl_backward(Tensor grad, {_INPUTS}, Tensor lse_a, Tensor lse_b) -> (Tensor, Tensor, Tensor)",
    reference=reference.linear_kl_backward,
    fake=_fake_backward,
    example=_example_backward,
    cpu=backends.Implementation(_cpu_backward, _CPU_DTYPES, "x86-64"),
    triton=backends.triton_kernel("linear_kl", "linear_kl_backward"),
    inputs=slice(1, 10),
)
torch.library.register_autograd("chassis::linear_kl", _backward, setup_context=_setup_context, lib=backends.library)
backends.no_second_derivative("linear_kl", "use reference.linear_kl.linear_kl")
