"""Everything the closed forms need from one pass over text: moments for every layer and the expert's mean probabilities.

For each layer l the pairs (x_l, h_e) go into `Moments`, h_e being the expert's final hidden state (or, for a callable
expert, its logits in the base's vocabulary). Every `fisher_stride`-th row also adds its next-token probabilities to p̄,
the diagonal of the metric in which a change of logits is measured: diag(p̄) - p̄ p̄^T. (Keeping E[p p^T] instead of
p̄ p̄^T costs a second pass over the unembedding and moved no rank by more than 0.2 % of the KL.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from chassis.experts import Readout
from chassis.probes import Rows
from chassis_kernels import Moments, mean_probabilities, update_layers


class Statistics:
    """`layers` {l: Moments(D, E)}, `final` Moments(D, E), `mean_p` [V] fp64; `base` and `expert` are the readouts."""

    def __init__(self, base: Readout, expert: Readout, *, layers: tuple[int, ...] = (), fisher_stride: int = 8) -> None:
        vocab_size, width = base.weight.shape
        target = vocab_size if expert.weight is None else expert.weight.shape[1]
        device = base.weight.device
        self.base, self.expert, self.fisher_stride = base, expert, fisher_stride
        self.layers = {layer: Moments(width, target, device=device) for layer in layers}
        self.final = Moments(width, target, device=device)
        self.p_sum = torch.zeros(vocab_size, dtype=torch.float64, device=device)
        self.n_rows = 0

    def update(self, rows: Rows) -> None:
        """Add one batch of rows."""
        target = rows.expert if self.expert.weight is not None else before_cap(rows.expert, self.base.softcap)
        hidden = [rows.final, *(rows.layers[layer] for layer in self.layers)]
        update_layers([self.final, *self.layers.values()], hidden, target)
        offset = -self.n_rows % self.fisher_stride
        self.n_rows += len(rows.final)
        sample = rows.expert[offset :: self.fisher_stride]
        if len(sample):
            self.p_sum += len(sample) * self._mean_probabilities(sample)

    def _mean_probabilities(self, rows: torch.Tensor) -> torch.Tensor:
        if self.expert.weight is None:
            return rows.float().softmax(-1).mean(0, dtype=torch.float64)
        return mean_probabilities(rows, *self.expert)

    @property
    def mean_p(self) -> torch.Tensor:
        """p̄ [V] fp64, summing to 1."""
        return self.p_sum / self.p_sum.sum()

    @property
    def n_bytes(self) -> int:
        """Bytes held by the moments."""
        return sum(value.numel() * value.element_size() for value in self.state_dict().values())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything needed to go on later, bit for bit."""
        state = {"p_sum": self.p_sum, "n_rows": torch.tensor(self.n_rows)}
        for name, moments in self._moments():
            state |= {f"{name}.{key}": value for key, value in moments.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from a `state_dict` made for the same models and layers."""
        self.p_sum, self.n_rows = state["p_sum"].clone(), int(state["n_rows"])
        for name, moments in self._moments():
            prefix = f"{name}."
            moments.load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})

    def _moments(self) -> Iterator[tuple[str, Moments]]:
        yield "final", self.final
        for layer, moments in self.layers.items():
            yield f"layer{layer}", moments


def before_cap(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """What a head that caps at `softcap` must put out before the cap to give these logits; beyond the cap, the nearest.

    A change of logits is added before the cap, so that this is the target where the expert gives logits themselves.
    """
    if softcap is None:
        return logits
    limit = 1 - 1e-4  # nearer to the cap its inverse only amplifies rounding
    return softcap * torch.atanh((logits.float() / softcap).clamp(-limit, limit))
