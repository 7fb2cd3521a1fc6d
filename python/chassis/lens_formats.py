"""Lenses in other libraries' layouts, both ways. Both end in the residual stream before the final norm, width D throughout.

tuned lens       a folder with config.json and params.pt, `{l}.weight` [D, D] and `{l}.bias` [D] for every block's input l:
                 h + h weight^T + bias, so that weight = (A_l - I)^T (Belrose et al., https://arxiv.org/abs/2303.08112)
Jacobian lens    one file, {"J": {l: [D, D]}, "n_prompts", "source_layers", "d_model"} for block outputs l: h J_l^T, without
                 an intercept, so that J_l = A_{l+1}^T
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch

from chassis.errors import ChassisError
from chassis.files import ensure_config_is, write_file, write_folder
from chassis.lens import Lens, LensConfig

TUNED, JACOBIAN = "tuned-lens", "jacobian"
JACOBIAN_FILE = "lens.pt"


def export_tuned(lens: Lens, folder: str | Path) -> list[str]:
    """Write config.json and params.pt as the tuned-lens library reads them; raises ChassisError for another kind of lens."""
    width = _width(lens)
    n_layers = lens.config.n_layers or len(lens.maps)
    missing = [layer for layer in range(n_layers) if layer not in lens.maps]
    if missing:
        raise ChassisError(f"no lens for layers {missing}: a tuned lens has all of 0..{n_layers - 1}; fit with all layers")
    state = {}
    for layer in range(n_layers):
        weight, bias = lens.maps[layer]
        state[f"{layer}.weight"] = (weight - torch.eye(width)).T.contiguous()
        state[f"{layer}.bias"] = bias.clone()
    config = {
        "base_model_name_or_path": lens.config.base,
        "d_model": width,
        "num_hidden_layers": n_layers,
        "bias": True,
        "base_model_revision": None,
        "unembed_hash": None,
        "lens_type": "linear_tuned_lens",
    }
    folder = ensure_config_is(folder, "lens_type")
    write_folder(folder, {"params.pt": _bytes(state), "config.json": json.dumps(config, indent=2)})
    return []


def import_tuned(folder: str | Path) -> Lens:
    """A tuned lens as the library's `save` wrote it; raises ChassisError for anything else."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        n_layers, width = config["num_hidden_layers"], config["d_model"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise ChassisError(f"{folder} holds no tuned lens ({error!r}): expected config.json and params.pt") from error
    state, maps = _load(folder / "params.pt"), {}
    for layer in range(n_layers):
        weight = state.get(f"{layer}.weight")
        if weight is None or weight.shape != (width, width):
            raise ChassisError(f"{folder / 'params.pt'}: no '{layer}.weight' [{width}, {width}] in it")
        bias = state.get(f"{layer}.bias", torch.zeros(width))
        maps[layer] = (weight.float().T + torch.eye(width)).contiguous(), bias.float()
    return Lens(maps, _config(config.get("base_model_name_or_path") or "", n_layers))


def export_jacobian(lens: Lens, folder: str | Path) -> list[str]:
    """Write lens.pt as the Jacobian lens library reads it; what its layout cannot hold is told. Raises ChassisError for
    another kind of lens."""
    width = _width(lens)
    jacobians = {layer - 1: lens.maps[layer][0].T.contiguous() for layer in lens.maps if layer != 0}
    if not jacobians:
        raise ChassisError("no lens behind the first block: the Jacobian lens reads the outputs of blocks")
    content = {
        "J": jacobians,
        "n_prompts": max(1, lens.config.n_windows),
        "source_layers": sorted(jacobians),
        "d_model": width,
    }
    write_file(Path(folder) / JACOBIAN_FILE, _bytes(content))
    notices = ["layer 0 was left out: it is the output of no block"] if 0 in lens.maps else []
    if any(bias.any() for _, bias in lens.maps.values()):
        notices.append("the biases were left out: the Jacobian lens has no intercept")
    return notices


def import_jacobian(path: str | Path, *, base: str = "") -> Lens:
    """A Jacobian lens from its file, or the folder of a lens.pt; raises ChassisError for anything else."""
    path = Path(path)
    content = _load(path / JACOBIAN_FILE if path.is_dir() else path)
    jacobians = content.get("J")
    if not isinstance(jacobians, dict) or not jacobians:
        raise ChassisError(f"{path} is no Jacobian lens: expected 'J' with a matrix for each layer, got {sorted(content)}")
    maps = {layer + 1: (jacobians[layer].float().T.contiguous(), torch.zeros(len(jacobians[layer]))) for layer in jacobians}
    lens = Lens(dict(sorted(maps.items())), _config(base, 0))
    lens.config.n_windows = int(content.get("n_prompts", 0))
    return lens


def _config(base: str, n_layers: int) -> LensConfig:
    return LensConfig(base=base, expert=base, target="pre_norm", n_layers=n_layers)


def _width(lens: Lens) -> int:
    shapes = {tuple(weight.shape) for weight, _ in lens.maps.values()}
    if lens.config.target != "pre_norm" or len(shapes) != 1 or len(set(*shapes)) != 1:
        raise ChassisError(
            f"this lens leads to the final state of {lens.config.expert or 'another model'} after its norm, and this layout "
            "to the model's own residual stream before the norm: fit one with `chassis lens fit`"
        )
    return next(iter(shapes))[0]


def _bytes(content: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _load(path: Path) -> dict:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)  # tensors and plain values, never code
    except Exception as error:  # the unpickler raises whatever a damaged file leads it to
        raise ChassisError(f"{path} cannot be read ({str(error).splitlines()[0]}): copy it again") from error
    if not isinstance(content, dict):
        raise ChassisError(f"{path}: expected a dictionary of tensors, got {type(content).__name__}")
    return content
