"""The adapter in closed form: the rank-r change of logits nearest to the full-rank one, in the metric of the KL.

With A the lens from the base's final state to the expert's, the full-rank change is B = L R^T, R the joint unembedding
[W_E, W_U] and L = [A, -I] (or A - I on a shared unembedding): a factor pair, never a D x V matrix. To second order the
KL of changing logits by d is d F d^T / 2 with F = diag(p̄) - p̄ p̄^T the softmax Fisher at the mean probabilities, so that
the best rank r minimises tr(Σ (B - B_r) F (B - B_r)^T), Σ the covariance of the base's states. Solution: P the leading
eigenvectors of Σ^½ B F B^T Σ^½ [D, D], and

    U = Σ^-½ P_r        V = P_r^T Σ^½ L R^T        bias = mean change of the logits

one factorisation for every rank. Cost O(V (D+E)^2 + D^3). Source: reduced-rank regression (Izenman 1975) in the Fisher
metric.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from chassis.adapter import Adapter
from chassis.errors import ChassisError
from chassis.experts import same_unembedding
from chassis.statistics import Statistics
from chassis_kernels import Moments, ridge

TILE = 2048  # rows of an unembedding copied at a time


@dataclass
class Change:
    """A change of logits, (h - mean) L R^T + bias: `factor` L [D, M] fp64, `joint` R [V, M] as the matrices that stand side
    by side in it, `bias` [V] fp64 the mean change."""

    factor: torch.Tensor
    joint: tuple[torch.Tensor, ...]
    bias: torch.Tensor

    def __mul__(self, share: float) -> Change:
        return replace(self, factor=self.factor * share, bias=self.bias * share)

    def __add__(self, other: Change) -> Change:
        factor = torch.cat([self.factor, other.factor], 1)
        return Change(factor, (*self.joint, *other.joint), self.bias + other.bias)


@dataclass
class ClosedForm:
    """A factorised change of logits. `spectrum` [D]: nats explained by each direction, to second order, descending."""

    statistics: Statistics
    solution: ridge.RidgeSolution
    spectrum: torch.Tensor
    directions: torch.Tensor  # P [D, D], in whitened coordinates
    left: torch.Tensor  # Σ^-½ P [D, D]
    right: torch.Tensor  # P^T Σ^½ L [D, M]
    joint: tuple[torch.Tensor, ...]  # R [V, M] as the matrices that stand side by side in it
    bias: torch.Tensor  # mean change of the logits [V]
    constant: torch.Tensor  # w [D]: h w is nearest to 1
    weights: dict | None = None  # of what it was made of, where that was chosen

    def __mul__(self, share: float) -> ClosedForm:
        """Of `share` of the change; the statistics stay."""
        return replace(self, spectrum=self.spectrum * share**2, right=self.right * share, bias=self.bias * share)

    def adapter(self, rank: int, columns: int | None = None) -> Adapter:
        """The adapter of this rank, over all tokens or over the `columns` tokens whose change matters most.

        Raises ChassisError for a rank above the width of the base or more columns than tokens.
        """
        vocab_size, width = self.statistics.base.weight.shape
        if not 1 <= rank <= width:
            raise ChassisError(f"rank {rank}: expected 1..{width}, {width} being the width of the base")
        if columns is not None and not 1 <= columns <= vocab_size:
            raise ChassisError(f"{columns} columns: expected 1..{vocab_size}, the size of the vocabulary")
        left, v, bias, cols = self.left[:, :rank], self._logits(self.right[:rank]), self.bias, None
        if columns is not None and columns < vocab_size:
            cols = self._choose(v, bias, columns)
            left, v = self._restrict(cols, rank)
            bias = bias[cols]
        fixed = self.statistics.final.mean_x, self.constant
        adapter = Adapter(*(t.float().contiguous() for t in (left, v, bias, *fixed)), cols)
        adapter.config.vocab_size = vocab_size
        return adapter

    def _logits(self, right: torch.Tensor) -> torch.Tensor:
        """`right` R^T [r, V], in tiles of the vocabulary: a head in bf16 is never copied whole."""
        parts = list(zip(right.float().split([part.shape[1] for part in self.joint], 1), self.joint, strict=True))
        starts = range(0, len(self.joint[0]), TILE)
        tiles = (sum(r @ part[start : start + TILE].float().T for r, part in parts) for start in starts)
        return torch.cat(list(tiles), 1).double()

    def _choose(self, v: torch.Tensor, bias: torch.Tensor, columns: int) -> torch.Tensor:
        """Columns by expected squared change x probability; in whitened coordinates the directions have unit variance."""
        score = self.statistics.mean_p * (v.square().sum(0) + bias.square())
        return score.topk(columns).indices.sort().values

    def _restrict(self, cols: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Factorise again with the change limited to `cols`: the directions that matter there are others."""
        weighted = self._logits(self.right)[:, cols]
        basis = _descending((weighted * self.statistics.mean_p[cols]) @ weighted.T)[1][:, :rank]
        return self.left @ basis, basis.T @ weighted


def closed_form(statistics: Statistics, alpha: float = 1e-4) -> ClosedForm:
    """Solve for the change of logits and factorise it. `alpha`: ridge relative to tr(S)/D.

    Raises ChassisError when the two models cap their logits differently.
    """
    base, expert = statistics.base, statistics.expert
    if expert.weight is not None and base.softcap != expert.softcap:
        raise ChassisError(
            f"the base caps its logits at {base.softcap} and the expert at {expert.softcap}: the change is not linear in "
            "the expert's hidden state; wrap the expert in CallableExpert to fit on its logits"
        )
    solution = ridge.solve(statistics.final, alpha)
    return factorise(statistics, solution, full_change(statistics, solution.W))


def factorise(
    statistics: Statistics, solution: ridge.RidgeSolution, change: Change, metric: torch.Tensor | None = None
) -> ClosedForm:
    """The best change of each rank for a full-rank one. `solution` gives the ridge of Σ; `metric`: `fisher` of the change's
    joint unembedding, where it is at hand."""
    moments = statistics.final
    identity = torch.eye(len(moments.mean_x), dtype=torch.float64, device=moments.mean_x.device)
    covariance, mean = (moments.S + solution.alpha * identity) / moments.count, moments.mean_x
    values, vectors = torch.linalg.eigh(covariance)
    root = values.clamp_min(values[-1] * torch.finfo(torch.float64).eps).sqrt()
    half, inverse_half = (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
    metric = fisher(change.joint, statistics.mean_p) if metric is None else metric
    whitened = half @ change.factor
    spectrum, directions = _descending(whitened @ metric @ whitened.T)
    return ClosedForm(
        statistics,
        solution,
        spectrum.clamp_min(0) / 2,
        directions,
        inverse_half @ directions,
        directions.T @ whitened,
        change.joint,
        change.bias,
        torch.linalg.solve(covariance + torch.outer(mean, mean), mean),
    )


def full_change(statistics: Statistics, lens: torch.Tensor) -> Change:
    """The full-rank change of the lens A [D, E] (or [D, V] when the expert gives logits)."""
    return Change(*_factor(statistics, lens), mean_change(statistics))


def _factor(statistics: Statistics, lens: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    base, expert = statistics.base, statistics.expert
    ratio = expert.scale / base.scale
    identity = torch.eye(len(lens), dtype=lens.dtype, device=lens.device)
    if same_unembedding(base, expert):
        return ratio * lens - identity, (base.weight,)
    if expert.weight is None:
        return identity, ((ratio * lens.T - base.weight).float(),)
    return torch.cat([ratio * lens, -identity], 1), (expert.weight, base.weight)


def fisher(joint: tuple[torch.Tensor, ...], mean_p: torch.Tensor) -> torch.Tensor:
    """R^T (diag(p̄) - p̄ p̄^T) R [M, M] fp64: the covariance of R's rows when tokens are drawn from p̄."""
    moments = Moments(sum(part.shape[1] for part in joint), device=mean_p.device)
    for start in range(0, len(mean_p), TILE):
        tile = torch.cat([part[start : start + TILE] for part in joint], 1)
        moments.update(tile, weight=mean_p[start : start + TILE])
    return moments.covariance


def mean_change(statistics: Statistics) -> torch.Tensor:
    """Mean of (expert logits - base logits) [V] fp64, in the base's units before its scale and cap."""
    base, expert, moments = statistics.base, statistics.expert, statistics.final
    target = moments.mean_y if expert.weight is None else _matvec(expert.weight, moments.mean_y)
    target = target if expert.bias is None else target + expert.bias.double()
    change = target * (expert.scale / base.scale) - _matvec(base.weight, moments.mean_x)
    return change if base.bias is None else change - base.bias.double()


def _matvec(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return torch.cat([tile.double() @ vector for tile in matrix.split(TILE)])


def _descending(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(0), vectors.flip(1)
