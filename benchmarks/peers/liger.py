"""liger-kernel's fused linear JSD at beta 0, the forward KL: one scalar, with gradients computed on the way."""

from __future__ import annotations

from benchmarks.cases import Case, Provider, simple

NAME, MODULE, OPS = "liger-kernel", "liger_kernel", ("linear_kl",)


def provide(case: Case, device: str) -> Provider | str:
    """The mean over rows; needs a GPU, as its kernels are Triton's."""
    if case.shape["r"]:
        return "has no gradients for a low-rank change"
    if device != "cuda":
        return "runs on GPUs alone"
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    def mean_kl(h_a, W_a, h_b, W_b):
        return LigerFusedLinearJSD(jsd_beta=0.0)(h_a, W_a, h_b, W_b).reshape(1)

    return simple(mean_kl, of=lambda full: (full[0].mean().reshape(1),))
