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


def refine(
    closed: ClosedForm,
    rank: int,
    batches: Iterable[Rows],
    validation: Sequence[Rows] | Callable[[], Iterable[Rows]],
    *,
    steps: int = 60,
    rate: float = 2e-2,
    columns: int | None = None,
    check_every: int = 10,
    progress: Callable[[int, float], None] | None = None,
) -> Refinement:
    """Refine the closed form of this rank on `batches` (one batch a step, at most `steps`).

    `validation` gives rows of documents that are not fitted on. `progress(step, train_kl)` is called after each step.
    Raises ChassisError if a step gives a KL that is not finite.
    """
    if steps < 1 or rate <= 0:
        raise ChassisError(f"{steps} steps at rate {rate}: expected at least one step and a positive rate")
    held_out = validation if callable(validation) else lambda: validation
    base, expert = closed.statistics.base, closed.statistics.expert
    start = closed.adapter(rank, columns)
    whiten = closed.left @ closed.directions.T  # Σ^-½: closed.left is Σ^-½ P with P orthogonal
    factor = torch.linalg.solve(whiten, start.U.double()).float()  # orthonormal columns, entries of size D^-½
    whiten = whiten.float()
    parameters = [p.clone().requires_grad_() for p in (factor, start.V, start.bias)]
    groups = [{"params": parameters[:1], "lr": 12 * rate / len(factor) ** 0.5}, {"params": parameters[1:]}]
    optimizer = torch.optim.Adam(groups, lr=rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=rate / 50)

    def current() -> Adapter:
        u, v, c = (parameter.detach().clone() for parameter in parameters)
        u, v = _ordered(u, v, closed.statistics.mean_p, start.cols)
        return replace(start, U=whiten @ u, V=v, bias=c, config=replace(start.config, refined=True))

    best, best_kl = start, mean_kl(start, base, expert, held_out())
    result = Refinement(start, False, best_kl, best_kl, mean_kl(None, base, expert, held_out()))
    for step, rows in zip(range(1, steps + 1), batches, strict=False):
        hidden = rows.final.float()
        delta = _delta(start, ((hidden - start.mean) @ whiten) @ parameters[0], *parameters[1:])
        loss = kl_rows(rows.final, base, rows.expert, expert, delta).mean()
        if not math.isfinite(loss.item()):
            raise ChassisError(f"the KL became {loss.item()} at step {step} of the refinement: lower the rate ({rate})")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        entry = {"step": step, "train_kl": loss.item(), "validation_kl": None}
        if step % check_every == 0 or step == steps:
            entry["validation_kl"] = mean_kl(current(), base, expert, held_out())
            if entry["validation_kl"] < best_kl:
                best, best_kl = current(), entry["validation_kl"]
        result.steps.append(entry)
        if progress:
            progress(step, loss.item())
    result.adapter, result.kept, result.validation_kl = best, best is not start, best_kl
    return result


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


def _delta(start: Adapter, u: torch.Tensor, v: torch.Tensor, c: torch.Tensor) -> Delta:
    if start.cols is None:
        return Delta(u, v, c)
    size = start.config.vocab_size
    wide = v.new_zeros(len(v), size).index_add(1, start.cols, v)
    return Delta(u, wide, c.new_zeros(size).index_add(0, start.cols, c))


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
