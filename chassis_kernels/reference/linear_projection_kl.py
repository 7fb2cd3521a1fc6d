"""projection_kl of a student whose logits are products, z = cap(h Wᵀ + bias) with cap(x) = s tanh(x / s), in eager PyTorch.

With dz = dloss/dz from the closed form in `projection_kl.py`, and dx = dz (1 - (z / s)²) where there is a cap:

    dh = dx W        dW = dxᵀ h        dbias = Σ_t dx_t

Here the [T, V] logits exist: this is the definition, what a backend without them must equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chassis_kernels.chunks import Chunks
from chassis_kernels.reference import projection_kl as logits_loss
from chassis_kernels.reference import teacher as teacher_logits
from chassis_kernels.reference.precision import compute_dtype, without_autocast
from chassis_kernels.reference.projection_kl import ProjectionKLStats
from chassis_kernels.sparse import SparseProjection
from chassis_kernels.teacher import Teacher


def loss(
    student_hidden: Tensor,  # [B, T_s, D]
    student_weight: Tensor,  # [>= V_s, D]
    teacher: Teacher,
    projection: SparseProjection,
    chunks: Chunks,
    *,
    student_bias: Tensor | None = None,
    student_softcap: float | None = None,
    **options,
) -> tuple[Tensor, ProjectionKLStats]:
    """`chassis_kernels.linear_projection_kl` under autograd, over all of the vocabulary."""
    dtype = compute_dtype(student_hidden, student_weight)
    z = logits(student_hidden, student_weight, student_bias, None, student_softcap, projection.n_student, dtype)
    return logits_loss.loss(z, teacher_logits.logits(teacher, projection.n_teacher), projection, chunks, **options)


@without_autocast
def linear_projection_kl(
    hidden: Tensor,  # [N_s, D]
    weight: Tensor,  # [>= V_s, D]
    bias: Tensor | None,  # [>= V_s]
    ids: Tensor | None,  # [V_s] int64: the rows of weight that stand for the tokens; None: the first ones
    softcap: float | None,
    *arguments,  # those of projection_kl after the student
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kl [M], agree [M] bool and nll as projection_kl has them; correct [N_s] bool: no logit is above the label's; the last
    two are empty where there are no labels."""
    z = logits(hidden, weight, bias, ids, softcap, arguments[8], compute_dtype(hidden, weight, arguments[0]))
    kl, agree, nll, row_max, *_ = logits_loss.projection_kl(z, *arguments)
    return kl, agree, nll, _correct(z, arguments[7], row_max)


@without_autocast
def linear_projection_kl_backward(
    grad: Tensor,  # [M]
    grad_nll: Tensor | None,  # [N_s]
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor | None,
    softcap: float | None,
    *arguments,  # those of projection_kl after the student, then which gradients are wanted: hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of the forward pass, then the gradients of Σ grad kl + Σ grad_nll nll for hidden, weight and bias in
    float32 (float64 if an input is), weight's as `weight_gradient_dtype` says; empty where not wanted."""
    *arguments, needs = arguments
    dtype, width = compute_dtype(hidden, weight, arguments[0]), arguments[8]
    z = logits(hidden, weight, bias, ids, softcap, width, dtype)
    kl, agree, nll, *rows = logits_loss.projection_kl(z, *arguments)
    dx = logits_loss.projection_kl_backward(grad, grad_nll, z, *arguments, *rows)
    if softcap is not None:
        dx = dx * (1 - (z / softcap) ** 2)
    chosen, nothing = slice(0, width) if ids is None else ids, z.new_zeros(0)
    grads = [nothing, nothing.to(weight_gradient_dtype(hidden, weight, dtype)), nothing]
    if needs[0]:
        grads[0] = dx @ weight[chosen].to(dtype)
    if needs[1]:
        grads[1] = torch.zeros_like(weight, dtype=grads[1].dtype)
        grads[1][chosen] = (dx.T @ hidden.to(dtype)).to(grads[1].dtype)
    if needs[2]:
        grads[2] = torch.zeros_like(bias, dtype=dtype)
        grads[2][chosen] = dx.sum(0)
    return kl, agree, nll, _correct(z, arguments[7], rows[0]), *grads


def weight_gradient_dtype(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """bfloat16 where both operands are, else that of the sums, `dtype`: a gradient in bfloat16 is rounded as its sums are
    finished, so that they need not all exist. float16 would lose what a loss scale is to save."""
    both = hidden.dtype == weight.dtype == torch.bfloat16
    return torch.bfloat16 if both else dtype


def logits(
    hidden: Tensor,  # [.., D]
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor | None,
    softcap: float | None,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """cap(hidden weightᵀ + bias) [.., width] in `dtype`."""
    chosen = slice(0, width) if ids is None else ids
    z = hidden.to(dtype) @ weight[chosen].to(dtype).T
    if bias is not None:
        z = z + bias[chosen].to(dtype)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _correct(z: Tensor, labels: Tensor | None, row_max: Tensor) -> Tensor:
    if labels is None:
        return torch.zeros(0, dtype=torch.bool, device=z.device)
    return (labels >= 0) & (z.gather(1, labels.clamp_min(0)[:, None])[:, 0] == row_max)
