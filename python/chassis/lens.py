"""A lens: one affine map per layer from the base's residual stream to the expert's final hidden state.

Read through the expert's unembedding it gives that layer's best linear guess of the expert's logits. Because ridge is
linear in its target this is the same lens as regressing on [N, V] logits, at E/V of the cost.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from chassis.errors import ChassisError
from chassis.files import write_folder
from chassis.statistics import Statistics
from chassis_kernels import ridge

FORMAT = "chassis-lens-1"
FINAL = "final"


@dataclass
class LensConfig:
    """Where a lens came from. `space` of the layers: residual stream; of "final": after the final norm."""

    base: str = ""
    expert: str = ""
    vocabulary_hash: str = ""
    alpha: float = 0.0
    format: str = FORMAT


class Lens:
    """`maps` {layer: (A [D, E], b [E])} in fp32; layer l reads the input of block l, "final" the unembedding's input."""

    def __init__(self, maps: dict[int | str, tuple[torch.Tensor, torch.Tensor]], config: LensConfig | None = None) -> None:
        self.maps, self.config = maps, config or LensConfig()

    @property
    def layers(self) -> list[int | str]:
        return list(self.maps)

    def hidden(self, layer: int | str, states: torch.Tensor) -> torch.Tensor:
        """The expert's final hidden state guessed from this layer: [N, D] -> [N, E] fp32."""
        if layer not in self.maps:
            raise ChassisError(f"no lens for layer {layer}: this one has {', '.join(map(str, self.maps))}")
        weight, bias = self.maps[layer]
        if states.shape[-1] != weight.shape[0]:
            raise ChassisError(f"states of width {states.shape[-1]} for a lens of width {weight.shape[0]}")
        return states.float() @ weight + bias

    def save(self, folder: str | Path) -> Path:
        """Write lens.safetensors (`<layer>.weight` [D, E], `<layer>.bias` [E]) and config.json."""
        tensors = {}
        for layer, (weight, bias) in self.maps.items():
            tensors[f"{layer}.weight"], tensors[f"{layer}.bias"] = weight.cpu().contiguous(), bias.cpu().contiguous()
        return write_folder(folder, {"lens.safetensors": tensors, "config.json": json.dumps(asdict(self.config), indent=2)})

    @classmethod
    def load(cls, folder: str | Path) -> Lens:
        """Read what `save` wrote; raises ChassisError for anything else."""
        folder = Path(folder)
        try:
            raw = json.loads((folder / "config.json").read_text())
            tensors = load_file(folder / "lens.safetensors")
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise ChassisError(f"{folder} holds no readable lens ({error}): fit or copy it again") from error
        if raw.get("format") != FORMAT:
            raise ChassisError(f"{folder}: format {raw.get('format')!r}, this version reads {FORMAT!r}")
        names = {key.rsplit(".", 1)[0] for key in tensors}
        layers = sorted(int(n) for n in names if n.isdigit()) + [n for n in names if not n.isdigit()]
        maps = {layer: (tensors[f"{layer}.weight"], tensors[f"{layer}.bias"]) for layer in layers}
        return cls(maps, LensConfig(**{k: v for k, v in raw.items() if k in LensConfig.__dataclass_fields__}))


def fit_lens(statistics: Statistics, alpha: float = 1e-4, config: LensConfig | None = None) -> Lens:
    """Ridge for every layer that was collected and for the final state; `alpha` relative to tr(S)/D."""
    config = config or LensConfig()
    config.alpha = alpha
    maps = {}
    for layer, moments in [*statistics.layers.items(), (FINAL, statistics.final)]:
        solution = ridge.solve(moments, alpha)
        maps[layer] = solution.W.float(), solution.b.float()
    return Lens(maps, config)
