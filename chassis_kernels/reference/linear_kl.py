"""KL(softmax(b) || softmax(a)) per row for logits that are linear in hidden states, in eager PyTorch.

a = cap_a(scale_a (h_a W_aᵀ + bias_a + u v + c)),  b = cap_b(scale_b (h_b W_bᵀ + bias_b)) or h_b itself,
cap(z) = s tanh(z / s). With respect to the logits the gradient is dKL/da = softmax(a) - softmax(b).
Works in chunks of `ROW_CHUNK` rows, so that no more than a few [ROW_CHUNK, V] tensors exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from chassis_kernels.reference.precision import compute_dtype, without_autocast

ROW_CHUNK = 256
VOCABULARY_CHUNK = 4096


def logits_of(
    h: Tensor,  # [n, D]
    W: Tensor | None,  # [V, D]
    bias: Tensor | None,  # [V]
    u: Tensor | None,  # [n, r]
    v: Tensor | None,  # [r, V]
    c: Tensor | None,  # [V]
    softcap: float | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:  # [n, V]
    """cap(scale (h Wᵀ + bias + u v + c)) in `dtype`; without W, h itself."""
    if W is None:
        return h.to(dtype)
    # a tile of W at a time where it needs a copy in `dtype`
    tiles = (W,) if W.dtype == dtype else W.split(VOCABULARY_CHUNK)
    z = torch.cat([h.to(dtype) @ tile.to(dtype).T for tile in tiles], 1)
    for term in (bias, c):
        if term is not None:
            z = z + term.to(dtype)
    if u is not None:
        z = z + u.to(dtype) @ v.to(dtype)
    z = scale * z
    return z if softcap is None else softcap * torch.tanh(z / softcap)


@without_autocast
def linear_kl(h_a, W_a, h_b, W_b, bias_a, bias_b, u, v, c, softcap_a, softcap_b, scale_a, scale_b):
    """-> kl [N] (float32, or float64 if an input is), lse_a, lse_b [N] float64, argmax_a, argmax_b [N] int64."""
    dtype = compute_dtype(h_a, W_a, h_b, W_b, bias_a, bias_b, u, v, c)
    n = h_a.shape[0]
    kl = h_a.new_empty(n, dtype=dtype)
    lse_a, lse_b = (h_a.new_empty(n, dtype=torch.float64) for _ in range(2))
    argmax_a, argmax_b = (h_a.new_empty(n, dtype=torch.int64) for _ in range(2))
    for rows in row_chunks(n):
        a = logits_of(h_a[rows], W_a, bias_a, _rows(u, rows), v, c, softcap_a, scale_a, dtype)
        b = logits_of(h_b[rows], W_b, bias_b, None, None, None, softcap_b, scale_b, dtype)
        log_a, log_b = a.log_softmax(1), b.log_softmax(1)
        terms = torch.where(log_b == -torch.inf, 0.0, log_b.exp() * (log_b - log_a))
        terms = terms.masked_fill((log_a == -torch.inf) & (log_b > -torch.inf), torch.inf)  # not 0 · inf, if exp underflows
        kl[rows] = terms.sum(1)
        lse_a[rows], lse_b[rows] = a.logsumexp(1), b.logsumexp(1)
        argmax_a[rows], argmax_b[rows] = a.argmax(1), b.argmax(1)
    return kl, lse_a, lse_b, argmax_a, argmax_b


@without_autocast
def linear_kl_backward(
    grad, h_a, W_a, h_b, W_b, bias_a, bias_b, u, v, c, softcap_a, softcap_b, scale_a, scale_b, lse_a, lse_b
):
    """-> gradients for u [N, r], v [r, V] and c [V] (empty without c), each in its input's dtype.

    A fused backend reads the log-sum-exps of the forward pass; here softmax finds them again.
    """
    inputs = h_a, W_a, h_b, W_b, bias_a, bias_b, u, v, c, softcap_a, softcap_b, scale_a, scale_b
    grads = zip(_gradients(grad, *inputs), (u, v, v if c is None else c), strict=True)
    return tuple(found.to(tensor.dtype) for found, tensor in grads)


@without_autocast
def linear_kl_with_gradients(*inputs):
    """`linear_kl`, and the gradients of its sum over rows as computed, empty where the last argument, bool[3], is False."""
    *inputs, needs = inputs
    found = linear_kl(*inputs)
    grads = _gradients(torch.ones_like(found[0]), *inputs)
    return *found, *(grad if need else grad.new_zeros(0) for grad, need in zip(grads, needs, strict=True))


def _gradients(grad, h_a, W_a, h_b, W_b, bias_a, bias_b, u, v, c, softcap_a, softcap_b, scale_a, scale_b):
    dtype = compute_dtype(h_a, W_a, h_b, W_b, bias_a, bias_b, u, v, c)
    grad_u, grad_v = torch.zeros_like(u, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    grad_c = grad_v.new_zeros(0 if c is None else c.shape[0])
    for rows in row_chunks(h_a.shape[0]):
        a = logits_of(h_a[rows], W_a, bias_a, u[rows], v, c, softcap_a, scale_a, dtype)
        b = logits_of(h_b[rows], W_b, bias_b, None, None, None, softcap_b, scale_b, dtype)
        dz = a.softmax(1) - b.softmax(1)
        if softcap_a is not None:
            dz = dz * (1 - (a / softcap_a) ** 2)
        dz = dz * (scale_a * grad[rows, None].to(dtype))
        grad_u[rows] = dz @ v.to(dtype).T
        grad_v += u[rows].to(dtype).T @ dz
        if c is not None:
            grad_c += dz.sum(0)
    return grad_u, grad_v, grad_c


@without_autocast
def mean_probabilities(h: Tensor, W: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> Tensor:
    """-> [V] float64: the mean over rows of softmax(cap(scale (h Wᵀ + bias)))."""
    dtype = compute_dtype(h, W, bias)
    total = torch.zeros(W.shape[0], dtype=torch.float64, device=h.device)
    for rows in row_chunks(h.shape[0]):
        total += logits_of(h[rows], W, bias, None, None, None, softcap, scale, dtype).softmax(1).sum(0, dtype=torch.float64)
    return total / h.shape[0]


def row_chunks(n: int) -> Iterator[slice]:
    """Slices of at most ROW_CHUNK rows that cover range(n)."""
    return (slice(start, min(start + ROW_CHUNK, n)) for start in range(0, n, ROW_CHUNK))


def _rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]
