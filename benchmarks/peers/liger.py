"""liger-kernel's fused losses at beta 0, the forward KL: one scalar, its gradients computed on the way.

Where there is a GPU its Triton kernels; on CPU its chunked PyTorch loss, which needs no kernel.
"""

from __future__ import annotations

import torch

from benchmarks.cases import Case, Provider, simple
from benchmarks.distillation import whole

NAME, MODULE, OPS = "liger-kernel", "liger_kernel", ("linear_kl", "token_kl")


def provide(case: Case, device: str) -> Provider | str:
    """The mean over rows."""
    return (_linear if case.op == "linear_kl" else _rows)(case, device)


def _linear(case: Case, device: str) -> Provider | str:
    if case.shape["r"]:
        return "has no gradients for a low-rank change"
    if device == "cuda":
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        loss = LigerFusedLinearJSD(jsd_beta=0.0)
    else:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)

    def mean_kl(h_a, W_a, h_b, W_b):
        labels = None if device == "cuda" else torch.zeros(len(h_a), dtype=torch.int64)
        return loss(h_a, W_a, h_b, W_b, labels).detach().reshape(1)

    return simple(mean_kl, of=lambda full: (full[0].mean().reshape(1),))


def _rows(case: Case, device: str) -> Provider | str:
    if case.shape["k"] < case.shape["V"]:
        return "compares all tokens, not some columns"
    if device != "cuda":
        return "runs on GPUs alone"
    from liger_kernel.transformers import LigerJSD

    loss = LigerJSD(beta=0.0)

    def mean_kl(student, teacher):
        return loss(student[0].log_softmax(1), teacher[0].log_softmax(1))

    return whole(mean_kl, given=lambda teacher: (teacher,))
