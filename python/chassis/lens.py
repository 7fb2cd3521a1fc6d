"""A lens: one affine map per layer from the base's residual stream to the expert's final hidden state.

Read through the expert's unembedding it gives that layer's best linear guess of the expert's logits. Because ridge is
linear in its target this is the same lens as regressing on [N, V] logits, at E/V of the cost. A lens of a model onto itself
can also end before the final norm, as the tuned lens and the Jacobian lens do (`chassis.lens_formats`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from chassis.errors import ChassisError
from chassis.files import ensure_config_is, write_folder
from chassis.models import capture, inspect_head
from chassis.probes import Window, pad
from chassis.statistics import Statistics
from chassis_kernels import Moments, ridge, update_layers

FORMAT = "chassis-lens-1"
FINAL = "final"


@dataclass
class LensConfig:
    """Where a lens came from. `target`: the expert's final state after its norm ("final") or before it ("pre_norm")."""

    base: str = ""
    expert: str = ""
    vocabulary_hash: str = ""
    alpha: float = 0.0
    target: str = "final"
    n_layers: int = 0  # blocks of the base; 0 where it is not known
    n_windows: int = 0  # of text it was fitted on; 0 where it is not known
    format: str = FORMAT


class Lens:
    """`maps` {layer: (A [D, E], b [E])} in fp32; layer l reads the input of block l, "final" the unembedding's input."""

    def __init__(self, maps: dict[int | str, tuple[torch.Tensor, torch.Tensor]], config: LensConfig | None = None) -> None:
        self.maps, self.config = maps, config or LensConfig()

    @property
    def layers(self) -> list[int | str]:
        return list(self.maps)

    def hidden(self, layer: int | str, states: torch.Tensor) -> torch.Tensor:
        """The expert's final hidden state (in the space `config.target`) guessed from this layer: [N, D] -> [N, E] fp32."""
        if layer not in self.maps:
            raise ChassisError(f"no lens for layer {layer}: this one has {', '.join(map(str, self.maps))}")
        weight, bias = self.maps[layer]
        if states.shape[-1] != weight.shape[0]:
            raise ChassisError(f"states of width {states.shape[-1]} for a lens of width {weight.shape[0]}")
        return states.float() @ weight + bias

    def check_base(self, *, width: int, vocabulary_hash: str = "") -> None:
        """Raise ChassisError unless this lens was fitted on a model of this width and vocabulary."""
        name, theirs = self.config.base or "another model", self.config.vocabulary_hash
        widths = {weight.shape[0] for weight, _ in self.maps.values()}
        if widths != {width}:
            raise ChassisError(f"the lens reads states of width {sorted(widths)}, this model has {width}: it is of {name}")
        if vocabulary_hash and theirs and vocabulary_hash != theirs:
            raise ChassisError(
                f"the lens is of {name}, whose tokens have other ids than this model's: use the lens with that"
            )

    def save(self, folder: str | Path) -> Path:
        """Write lens.safetensors (`<layer>.weight` [D, E], `<layer>.bias` [E]) and config.json; raises ChassisError where
        `folder` holds the config.json of something else."""
        tensors = {}
        for layer, (weight, bias) in self.maps.items():
            tensors[f"{layer}.weight"], tensors[f"{layer}.bias"] = weight.cpu().contiguous(), bias.cpu().contiguous()
        config = json.dumps(asdict(self.config), indent=2)
        folder = ensure_config_is(folder, "format", FORMAT)
        return write_folder(folder, {"lens.safetensors": tensors, "config.json": config})

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


@torch.no_grad()
def fit_self_lens(
    model: torch.nn.Module,
    windows: Sequence[Window],
    alpha: float = 1e-4,
    config: LensConfig | None = None,
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> Lens:
    """A lens from the input of every block (or of `layers`) onto the model's own residual stream before the final norm.

    One pass, one ridge solve per layer; `progress` is called with the number of windows done. Raises ModelError for a model
    without a single list of blocks.
    """
    config, n_layers = config or LensConfig(), len(inspect_head(model).blocks)
    config.alpha, config.target, config.n_layers, config.n_windows = alpha, "pre_norm", n_layers, len(windows)
    layers = tuple(range(n_layers)) if layers is None else tuple(layers)
    width, device = model.get_output_embeddings().weight.shape[1], model.get_output_embeddings().weight.device
    moments = {layer: Moments(width, width, device=device) for layer in layers}
    for start in range(0, len(windows), batch_size):
        ids, mask, _ = pad([window.ids for window in windows[start : start + batch_size]], "right")
        captured = capture(model, ids, mask, layers=layers, pre_norm=True)
        rows = mask.bool().to(device)
        hidden = [captured.layers[layer][rows] for layer in layers]
        update_layers([moments[layer] for layer in layers], hidden, captured.pre_norm[rows])
        if progress:
            progress(min(start + batch_size, len(windows)))
    solved = {layer: ridge.solve(each, alpha) for layer, each in moments.items()}
    return Lens({layer: (each.W.float(), each.b.float()) for layer, each in solved.items()}, config)
