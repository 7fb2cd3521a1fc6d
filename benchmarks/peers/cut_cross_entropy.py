"""cut-cross-entropy: the labels' cross entropy without [N, V] logits. It takes no second distribution."""

from __future__ import annotations

from benchmarks.cases import Case, Provider

NAME, MODULE, OPS = "cut-cross-entropy", "cut_cross_entropy", ("linear_kl",)


def provide(case: Case, device: str) -> Provider | str:
    """None for linear_kl: a case with labels will have one."""
    return "takes labels, not distributions"
