"""log Σ exp of rows of logits in one visit of each row, where torch's takes several passes over all of them.

There is no GPU kernel: CUDA tensors take the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chassis_kernels import backends
from chassis_kernels.reference import log_sums as reference
from chassis_kernels.reference.precision import compute_dtype

_CPU_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def log_sums(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log Σ_v exp(logits[n, v] / temperature) [N] in nats, float32 (float64 of float64), of logits [N, V].

    -inf for a row that is -inf everywhere, +inf for one with a +inf, NaN for one with a NaN. Not differentiable: detach the
    logits, or take `torch.logsumexp`. Raises ValueError for other shapes, dtypes or temperatures.
    """
    if logits.dim() != 2 or logits.dtype not in backends.DTYPE_CODES:
        raise ValueError(f"logits are {logits.dtype} {tuple(logits.shape)}: expected floats [N, V]")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: expected a positive number")
    return _log_sums(logits, float(temperature))


def _cpu(logits: Tensor, temperature: float) -> Tensor:
    logits, out = backends.rows_contiguous(logits), torch.empty(len(logits))
    backends._C.log_sums(backends.matrix_args(logits), temperature, out.data_ptr())
    return out


def _no_gradient(ctx, grad):
    raise RuntimeError("log_sums has no gradient: detach the logits, or take torch.logsumexp")


_log_sums = backends.register(
    "log_sums(Tensor logits, float temperature) -> Tensor",
    reference=reference.log_sums,
    fake=lambda logits, temperature: logits.new_empty(len(logits), dtype=compute_dtype(logits)),
    example=lambda device: (torch.randn(5, 37, generator=torch.Generator().manual_seed(0)).to(device), 1.5),
    cpu=backends.Implementation(_cpu, _CPU_DTYPES, "x86-64"),
)
torch.library.register_autograd(
    "chassis::log_sums", _no_gradient, setup_context=lambda ctx, inputs, output: None, lib=backends.library
)
