"""Refinement: a few dozen steps on the KL itself, starting from the closed form, never ending with something worse.

The closed form minimises a second-order picture of the KL with one Fisher matrix for all rows. Refinement minimises

    mean over rows of KL(expert || softmax(h W_U^T + (z U) V + c))        z = (h - mean) Σ^-½

in whitened coordinates z, where all directions of the input have unit variance and one step size fits them all (in raw
coordinates the few huge directions of hidden states make every step diverge). Adam with cosine decay; the step that is
best on the validation rows is kept, the closed form included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from chassis.adapter import Adapter
from chassis.closed_form import ClosedForm
from chassis.errors import ChassisError
from chassis.experts import Readout
from chassis.probes import Rows
from chassis_kernels import Delta, linear_kl


@dataclass
class Refinement:
    """The best adapter found and how the search went; KLs in nats per row."""

    adapter: Adapter
    kept: bool  # False: no step beat the closed form, which is returned
    closed_form_validation_kl: float
    validation_kl: float
    no_op_validation_kl: float
    steps: list[dict] = field(default_factory=list)  # {step, train_kl, validation_kl or None}

    def summary(self) -> dict:
        """For the report: everything but the adapter."""
        return {key: value for key, value in vars(self).items() if key != "adapter"}


def kl_rows(
    rows_a: torch.Tensor, a: Readout, rows_b: torch.Tensor, b: Readout, delta: Delta | None = None, stats: bool = False
):
    """KL(b || a) per row [N] in nats, through two readouts; with `stats` also chassis_kernels.LinearKLStats."""
    options = {} if b.weight is None else {"bias_b": b.bias, "softcap_b": b.softcap, "scale_b": b.scale}
    return linear_kl(
        rows_a,
        a.weight,
        rows_b,
        b.weight,
        bias_a=a.bias,
        softcap_a=a.softcap,
        scale_a=a.scale,
        delta=delta,
        stats=stats,
        **options,
    )


def delta_of(adapter: Adapter, hidden: torch.Tensor) -> Delta:
    """An adapter's change of the logits of these rows [N, D], as linear_kl takes it."""
    v, bias = adapter.full_columns()
    return Delta((hidden.float() - adapter.mean) @ adapter.U, v, bias)


class Refiner:
    """One adapter under refinement: `step` on a batch of rows, again and again, then `result`."""

    def __init__(
        self,
        closed: ClosedForm,
        rank: int,
        validation: Sequence[Rows],
        *,
        steps: int = 60,
        rate: float = 2e-2,
        columns: int | None = None,
        check_every: int = 10,
        expert: Readout | None = None,
    ) -> None:
        if steps < 1 or rate <= 0:
            raise ChassisError(f"{steps} steps at rate {rate}: expected at least one step and a positive rate")
        self.base, self.expert = closed.statistics.base, expert or closed.statistics.expert
        self.mean_p, self.validation = closed.statistics.mean_p, validation
        self.n_steps, self.rate, self.check_every = steps, rate, check_every
        self.start = closed.adapter(rank, columns)
        whiten = closed.left @ closed.directions.T  # Σ^-½: closed.left is Σ^-½ P with P orthogonal
        factor = torch.linalg.solve(whiten, self.start.U.double()).float()  # orthonormal columns, entries of size D^-½
        self.whiten = whiten.float()
        self.parameters = [p.clone().requires_grad_() for p in (factor, self.start.V, self.start.bias)]
        groups = [{"params": self.parameters[:1], "lr": 12 * rate / len(factor) ** 0.5}, {"params": self.parameters[1:]}]
        self.optimizer = torch.optim.Adam(groups, lr=rate, betas=(0.9, 0.99))
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps, eta_min=rate / 50)
        before = self._validate(self.start)
        self._result = Refinement(self.start, False, before, before, self._validate(None))

    def step(self, rows: Rows) -> float:
        """One gradient step on these rows; returns their KL before it, in nats. Raises ChassisError if it is not finite."""
        start = self.start
        u = ((rows.final.float() - start.mean) @ self.whiten) @ self.parameters[0]
        delta = Delta(u, *start.in_vocabulary(*self.parameters[1:]))
        loss = kl_rows(rows.final, self.base, rows.expert, self.expert, delta).mean()
        kl, number = loss.item(), len(self._result.steps) + 1
        if not math.isfinite(kl):
            raise ChassisError(f"the KL became {kl} at step {number} of the refinement: lower the rate ({self.rate})")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        entry = {"step": number, "train_kl": kl, "validation_kl": None}
        if number % self.check_every == 0 or number == self.n_steps:
            adapter = self._current()
            entry["validation_kl"] = self._validate(adapter)
            if entry["validation_kl"] < self._result.validation_kl:
                self._result.adapter, self._result.kept = adapter, True
                self._result.validation_kl = entry["validation_kl"]
        self._result.steps.append(entry)
        return kl

    def result(self) -> Refinement:
        """The best so far."""
        return self._result

    def _validate(self, adapter: Adapter | None) -> float:
        return mean_kl(adapter, self.base, self.expert, self.validation)

    def _current(self) -> Adapter:
        u, v, c = (parameter.detach().clone() for parameter in self.parameters)
        u, v = _ordered(u, v, self.mean_p, self.start.cols)
        return replace(self.start, U=self.whiten @ u, V=v, bias=c, config=replace(self.start.config, refined=True))


def refine(
    closed: ClosedForm,
    ranks: Sequence[int],
    batches: Iterable[Rows],
    validation: Sequence[Rows],
    *,
    steps: int = 60,
    progress: Callable[[int], None] | None = None,
    **options,
) -> dict[int, Refinement]:
    """Refine the closed forms of these ranks side by side, one batch a step, so that each batch is computed once.

    `validation` are rows of documents that are not fitted on; `options` go to Refiner. `progress(step)` is called after
    each step. Raises ChassisError if a step gives a KL that is not finite.
    """
    refiners = {rank: Refiner(closed, rank, validation, steps=steps, **options) for rank in ranks}
    for step, rows in zip(range(1, steps + 1), batches, strict=False):
        for refiner in refiners.values():
            refiner.step(rows)
        if progress:
            progress(step)
    return {rank: refiner.result() for rank, refiner in refiners.items()}


@torch.no_grad()
def mean_kl(adapter: Adapter | None, base: Readout, expert: Readout, batches: Iterable[Rows]) -> float:
    """Mean KL(expert || base + adapter) over rows, in nats; without an adapter, the no-op KL."""
    total, count = 0.0, 0
    for rows in batches:
        delta = None if adapter is None else delta_of(adapter, rows.final)
        total += kl_rows(rows.final, base, rows.expert, expert, delta).double().sum().item()
        count += len(rows.final)
    if not count:
        raise ChassisError("no validation rows: give validation documents")
    return total / count


def _ordered(
    u: torch.Tensor, v: torch.Tensor, mean_p: torch.Tensor, cols: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same map u v with orthonormal u [D, r], directions by what they explain in the metric of the closed form."""
    p = (mean_p if cols is None else mean_p[cols]).to(v.dtype)
    basis, triangle = torch.linalg.qr(u)
    v = triangle @ v
    mean = v @ p
    _, rotation = torch.linalg.eigh((v * p) @ v.T - torch.outer(mean, mean))
    rotation = rotation.flip(1)
    return basis @ rotation, rotation.T @ v
