"""The closed form for an expert that gives probabilities: one damped Gauss-Newton step on the KL, in hidden space.

Where the expert gives probabilities q over the base's tokens, with zeros among them, log q is nothing to regress on.
For base logits z = s (h Wᵀ + b) and p = softmax(z), the KL's gradient with respect to h is -g, g = s (q - p) W, and its
curvature, averaged over rows, is F = s² Wᵀ (diag(p̄) - p̄ p̄ᵀ) W. The best change of h that is linear in h solves

    Σ B F = Cov(h, g),   so that   h + step · g F⁻¹   is a target for the same ridge and factorisation as a hidden state's.

g is collected like a hidden state: one pass, [D, D] moments, no [N, V] kept. `step` is chosen on validation rows, and so is
the share of another change of the logits, foretold by the expert's states, that is added to it (`bridge.initial`). Source:
Gauss-Newton with the softmax Fisher of the mean probabilities, as in `closed_form`.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from chassis.closed_form import Change, ClosedForm, factorise, fisher, full_change
from chassis.errors import ChassisError
from chassis.experts import Readout
from chassis.probes import Rows
from chassis.refine import mean_kl
from chassis.statistics import Statistics
from chassis_kernels import Moments, ridge

DAMPING = 1e-2  # added to F, relative to its mean eigenvalue
STEP, SEMANTIC = "Gauss-Newton step", "semantic change"
INITS = ("both", "newton", "semantic")
STEPS = (1.0, 0.5, 0.25, 0.1, 0.03)
SHARES = (0.5, 0.25)  # of the semantic change
TILE = 256  # rows whose probabilities exist at a time
TRIED = 1024  # validation rows that weights are tried on: of one row all see the same noise


class ProbabilityStatistics(Statistics):
    """Moments of (h, g); `p_sum` is the sum of the expert's probabilities, `base_p_sum` of the base's. `pairs` are the
    moments of the final states of both models (`experts.ProbabilityExpert`), the expert's of width `paired`."""

    def __init__(self, base: Readout, expert: Readout, paired: int) -> None:
        super().__init__(base, base)
        self.target, self.pairs = expert, Moments(base.weight.shape[1], paired, device=base.weight.device)
        self.base_p_sum = torch.zeros_like(self.p_sum)

    def update(self, rows: Rows) -> None:
        """Add one batch: rows.expert [n, V] are log-probabilities."""
        weight, slopes = self.base.weight.float(), torch.empty(rows.final.shape, device=rows.final.device)
        for hidden, log_q, g in zip(*(x.split(TILE) for x in (rows.final, rows.expert, slopes)), strict=True):
            q = log_q.float().exp()
            p, slope = probabilities(hidden, self.base)
            self.p_sum += q.sum(0)  # of TILE rows float32 loses nothing that counts
            self.base_p_sum += p.sum(0)
            change = q.sub_(p) if slope is None else q.sub_(p).mul_(slope)
            torch.mm(change, weight, out=g)
        self.final.update(rows.final, slopes.mul_(self.base.scale))
        self.n_rows += len(rows.final)

    def _moments(self) -> Iterator[tuple[str, Moments]]:
        yield from super()._moments()
        yield "pairs", self.pairs

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
    logits, slope = logits if base.scale == 1 else logits * base.scale, None
    if base.softcap is not None:
        bent = torch.tanh(logits / base.softcap)
        logits, slope = base.softcap * bent, 1 - bent * bent
    return logits.softmax(-1), slope


def newton_closed_form(
    statistics: ProbabilityStatistics,
    alpha: float,
    rank: int,
    validation: Sequence[Rows],
    semantic: Change | None = None,
    *,
    init: str = "both",
) -> ClosedForm:
    """The closed form whose adapter of `rank` leaves the smallest KL on the first TRIED validation rows, of these:

    * "newton": the step, each of STEPS times;
    * "semantic": the change `semantic`, once and each of SHARES times;
    * "both": as "newton"; then the best step and half of it, each with each of SHARES of `semantic`, where there is one.

    `weights` of the closed form say what was chosen. For refinement, whose expert is `statistics.target`; the closed form's
    own is the base's unembedding. Raises ChassisError if none leaves a finite KL.
    """
    metrics: dict[int, torch.Tensor] = {}
    n_rows = list(itertools.accumulate(len(rows.final) for rows in validation))
    tried = validation[: bisect_left(n_rows, TRIED) + 1]

    whole = statistics.newton(1.0)
    solution = ridge.solve(whole.final, alpha)
    newton = full_change(whole, solution.W)

    def factorised(change: Change) -> ClosedForm:
        key = len(change.joint)
        if key not in metrics:
            metrics[key] = fisher(change.joint, whole.mean_p)
        return factorise(whole, solution, change, metrics[key])

    single = factorised(newton)

    def made(step: float, share: float) -> ClosedForm:
        if not share:
            found = single * step
        else:
            found = factorised(semantic * share + newton * step if step else semantic * share)
        return replace(found, weights={STEP: step, SEMANTIC: share})

    def better(
        best: ClosedForm | None, least: float, weights: Iterable[tuple[float, float]]
    ) -> tuple[ClosedForm | None, float]:
        for step, share in weights:
            closed = made(step, share)
            kl = mean_kl(closed.adapter(rank), statistics.base, statistics.target, tried)
            if kl < least:
                best, least = closed, kl
        return best, least

    alone = [(0.0, share) for share in (1.0, *SHARES)] if init == "semantic" else [(step, 0.0) for step in STEPS]
    first, least = better(None, math.inf, alone)
    if first is None:
        raise ChassisError(
            f"the KL on the validation rows is finite for none of the steps {', '.join(map(str, STEPS))}: check that the "
            "expert's log-probabilities hold no NaN, and that the base's hidden states are finite in this dtype"
        )
    best, step = first, first.weights[STEP]
    if init == "both" and semantic is not None:
        best, _ = better(first, least, itertools.product((step, step / 2), SHARES))
    return replace(best, statistics=statistics.newton(step))  # whose lens is that of the step alone
