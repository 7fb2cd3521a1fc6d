"""The closed form for an expert that gives probabilities: one damped Gauss-Newton step on the KL, in hidden space.

Where the expert gives probabilities q over the base's tokens, with zeros among them, log q is nothing to regress on.
For base logits z = s (h Wᵀ + b) and p = softmax(z), the KL's gradient with respect to h is -g, g = s (q - p) W, and its
curvature, averaged over rows, is F = s² Wᵀ (diag(p̄) - p̄ p̄ᵀ) W. The best change of h that is linear in h solves

    Σ B F = Cov(h, g),   so that   h + step · g F⁻¹   is a target for the same ridge and factorisation as a hidden state's.

g is collected like a hidden state: one pass, [D, D] moments, no [N, V] kept. `step` is chosen on validation rows. Source:
Gauss-Newton with the softmax Fisher of the mean probabilities, as in `closed_form`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from chassis.closed_form import ClosedForm, closed_form, fisher
from chassis.errors import ChassisError
from chassis.experts import Readout
from chassis.probes import Rows
from chassis.refine import mean_kl
from chassis.statistics import Statistics

DAMPING = 1e-2  # added to F, relative to its mean eigenvalue
STEPS = (1.0, 0.5, 0.25, 0.1, 0.03)
TILE = 512  # rows whose probabilities exist at a time


class ProbabilityStatistics(Statistics):
    """Moments of (h, g); `p_sum` is the sum of the expert's probabilities, `base_p_sum` of the base's."""

    def __init__(self, base: Readout, expert: Readout, *, layers: tuple[int, ...] = (), fisher_stride: int = 8) -> None:
        super().__init__(base, base, layers=(), fisher_stride=fisher_stride)
        self.target = expert
        self.base_p_sum = torch.zeros_like(self.p_sum)

    def update(self, rows: Rows) -> None:
        """Add one batch: rows.expert [n, V] are log-probabilities."""
        for hidden, log_q in zip(rows.final.split(TILE), rows.expert.split(TILE), strict=True):
            q = log_q.float().exp()
            p, slope = probabilities(hidden, self.base)
            change = (q - p) * slope if slope is not None else q - p
            self.final.update(hidden, self.base.scale * (change @ self.base.weight.float()))
            self.p_sum += q.sum(0, dtype=torch.float64)
            self.base_p_sum += p.sum(0, dtype=torch.float64)
        self.n_rows += len(rows.final)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return super().state_dict() | {"base_p_sum": self.base_p_sum}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.base_p_sum = state.pop("base_p_sum").clone()
        super().load_state_dict(state)

    def newton(self, step: float) -> Statistics:
        """Statistics of (h, h + step · g F⁻¹): an expert with the base's own unembedding."""
        found = Statistics(self.base, self.base)
        found.p_sum, found.n_rows = self.p_sum.clone(), self.n_rows
        middle = 0.5 * (self.p_sum / self.p_sum.sum() + self.base_p_sum / self.base_p_sum.sum())
        metric = self.base.scale**2 * fisher((self.base.weight,), middle)
        damping = DAMPING * metric.diagonal().mean()
        solve = step * torch.linalg.inv(metric + damping * torch.eye(len(metric), dtype=metric.dtype, device=metric.device))
        whole = self.final.S  # of xx only a triangle is kept; asking for S also adds the batches that wait
        state = {name: tensor.clone() for name, tensor in self.final.state_dict().items()}
        state["xy"] = whole + state["xy"] @ solve
        state["mean_y"] = state["mean_x"] + state["mean_y"] @ solve
        found.final.load_state_dict(state)
        return found


def probabilities(hidden: torch.Tensor, base: Readout) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softmax of the base's logits [n, V] fp32, and the slope of its soft cap (None without one)."""
    logits = hidden.float() @ base.weight.float().T
    logits = logits if base.bias is None else logits + base.bias.float()
    logits, slope = logits * base.scale, None
    if base.softcap is not None:
        bent = torch.tanh(logits / base.softcap)
        logits, slope = base.softcap * bent, 1 - bent * bent
    return logits.softmax(-1), slope


def newton_closed_form(statistics: ProbabilityStatistics, alpha: float, rank: int, validation: Sequence[Rows]) -> ClosedForm:
    """The closed form of the step of STEPS that leaves the smallest KL on the validation rows at `rank`.

    For refinement, whose expert is `statistics.target`; the closed form's own is the base's unembedding. Raises ChassisError
    if no step leaves a finite KL.
    """
    best, least = None, math.inf
    for step in STEPS:
        closed = closed_form(statistics.newton(step), alpha)
        kl = mean_kl(closed.adapter(rank), statistics.base, statistics.target, validation)
        if kl < least:
            best, least = closed, kl
    if best is None:
        raise ChassisError(
            f"the KL on the validation rows is finite for none of the steps {', '.join(map(str, STEPS))}: check that the "
            "expert's log-probabilities hold no NaN, and that the base's hidden states are finite in this dtype"
        )
    return best
