"""A delta-logit adapter: a rank-r affine map from the base's final hidden state to a change of its logits.

    delta(h)[cols] = ((h - mean) U) V + bias        U [D, r], V [r, K], bias [K], mean [D], cols [K] or all V columns

The change is added to what the unembedding puts out, before any logit scale or soft cap. `chassis.port` plugs adapters
into a model, `chassis.merge` folds one into a checkpoint, `chassis.export` writes it in other libraries' formats.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from chassis.errors import ChassisError
from chassis.files import ensure_config_is, write_folder

FORMAT = "chassis-adapter-1"
FILES = ("adapter.safetensors", "config.json")
TENSORS = ("U", "V", "bias", "mean", "constant")


@dataclass
class AdapterConfig:
    """What an adapter was fitted on and how well it did; KLs in nats per token on validation documents."""

    base: str = ""
    expert: str = ""
    vocabulary_hash: str = ""
    width: int = 0
    vocab_size: int = 0
    rank: int = 0
    space: str = "final"
    positions: str = "all"
    data_fingerprint: str = ""
    n_rows: int = 0
    no_op_kl: float = float("nan")
    kl: float = float("nan")
    refined: bool = False
    format: str = FORMAT


@dataclass
class Adapter:
    """U [D, r], V [r, K], bias [K], mean [D], constant [D] in fp32; cols [K] int64 or None for the whole vocabulary.

    `constant` is the direction w with h w nearest to 1 over the fitted rows: what stands in for the bias where an output
    head cannot hold one (`fold_bias`); zero where that is not known.
    """

    U: torch.Tensor
    V: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    constant: torch.Tensor
    cols: torch.Tensor | None = None
    config: AdapterConfig = field(default_factory=AdapterConfig)

    def __post_init__(self) -> None:
        rank, columns = self.V.shape
        if self.U.shape[1] != rank:
            raise ChassisError(f"U is {list(self.U.shape)} and V is {list(self.V.shape)}: their ranks must agree")
        width = self.U.shape[0]
        for name, size in (("bias", columns), ("mean", width), ("constant", width), ("cols", columns)):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != (size,):
                raise ChassisError(f"{name} is {list(tensor.shape)}, expected [{size}] (U is {list(self.U.shape)})")
        self.config.width, self.config.rank = width, rank
        self.config.vocab_size = self.config.vocab_size or columns

    @property
    def rank(self) -> int:
        return self.U.shape[1]

    @property
    def n_parameters(self) -> int:
        return self.U.numel() + self.V.numel() + self.bias.numel() + self.mean.numel()

    @property
    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is stored, by name."""
        named = {name: getattr(self, name) for name in (*TENSORS, "cols")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def offset(self) -> torch.Tensor:
        """The bias [K] of the same map written without a mean: bias - mean U V."""
        return self.bias - (self.mean @ self.U) @ self.V

    def check_finite(self) -> None:
        """Raise ChassisError if a stored value is NaN or infinite."""
        bad = [name for name, tensor in self.tensors().items() if not torch.isfinite(tensor).all()]
        if bad:
            raise ChassisError(f"the adapter holds NaN or infinite values in {', '.join(bad)}: fit it again")

    def truncate(self, rank: int) -> Adapter:
        """The same fit at a smaller rank: directions are stored in order of what they explain."""
        if not 0 <= rank <= self.rank:
            raise ChassisError(f"rank {rank} of an adapter of rank {self.rank}: expected 0..{self.rank}")
        config = dataclasses.replace(self.config, rank=rank)
        return dataclasses.replace(self, U=self.U[:, :rank].contiguous(), V=self.V[:rank].contiguous(), config=config)

    def fold_bias(self) -> Adapter:
        """The nearest adapter without mean and bias, of rank r+1: h [U, w] [V; bias - mean U V] with w = `constant`.

        Raises ChassisError if `constant` is not known and there is something to fold.
        """
        offset = self.offset
        if offset.any() and not self.constant.any():
            raise ChassisError(
                "this adapter does not say which direction of the hidden states is constant (it was imported), so that its "
                "bias cannot be folded into weights: attach it, or export it with its bias"
            )
        return dataclasses.replace(
            self,
            U=torch.cat([self.U, self.constant[:, None]], 1),
            V=torch.cat([self.V, offset[None]]),
            bias=torch.zeros_like(self.bias),
            mean=torch.zeros_like(self.mean),
            config=dataclasses.replace(self.config),
        )

    def to(self, device: torch.device | str) -> Adapter:
        """A copy on `device`."""
        return Adapter(**{name: tensor.to(device) for name, tensor in self.tensors().items()}, config=self.config)

    def full_columns(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(V [r, vocabulary], bias [vocabulary]) with zeros in the columns the adapter leaves alone."""
        return self.in_vocabulary(self.V, self.bias)

    def in_vocabulary(self, v: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """v [r, K] and bias [K] over this adapter's columns, spread over the vocabulary; differentiable."""
        if self.cols is None:
            return v, bias
        size = self.config.vocab_size
        wide = v.new_zeros(len(v), size).index_add(1, self.cols, v)
        return wide, bias.new_zeros(size).index_add(0, self.cols, bias)

    def check_base(self, *, width: int, vocab_size: int, vocabulary_hash: str = "") -> None:
        """Raise ChassisError unless this adapter was made for a base of this width and vocabulary."""
        if width != self.config.width:
            raise ChassisError(
                f"the adapter expects hidden states of width {self.config.width} (fitted on {self.config.base!r}), "
                f"this base has width {width}: attach it to the base it was fitted on"
            )
        if vocab_size != self.config.vocab_size:
            raise ChassisError(
                f"the adapter changes a vocabulary of {self.config.vocab_size} tokens, this base has {vocab_size}: "
                f"attach it to the base it was fitted on ({self.config.base!r})"
            )
        if vocabulary_hash and self.config.vocabulary_hash and vocabulary_hash != self.config.vocabulary_hash:
            raise ChassisError(
                f"the adapter was fitted for vocabulary {self.config.vocabulary_hash[:12]}, this base's tokenizer is "
                f"{vocabulary_hash[:12]}: the token ids mean other strings; use the tokenizer of {self.config.base!r}"
            )

    def save(self, folder: str | Path) -> Path:
        """Write adapter.safetensors and config.json; both or, if the disk fails, neither. Raises ChassisError where
        `folder` holds the config.json of something else."""
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.tensors().items()}
        config = json.dumps(dataclasses.asdict(self.config), indent=2)
        return write_folder(ensure_config_is(folder, "format", FORMAT), {FILES[0]: tensors, FILES[1]: config})

    @classmethod
    def load(cls, folder: str | Path) -> Adapter:
        """Read what `save` wrote; safetensors only, so loading cannot run code. Raises ChassisError for anything else."""
        folder = Path(folder)
        for name in FILES:
            if not (folder / name).is_file():
                raise ChassisError(f"{folder} holds no adapter: {name} is missing (expected {' and '.join(FILES)})")
        try:
            raw = json.loads((folder / FILES[1]).read_text())
            tensors = load_file(folder / FILES[0])
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ChassisError(f"{folder}: damaged or truncated adapter ({error}); fit or copy it again") from error
        if raw.get("format") != FORMAT:
            raise ChassisError(f"{folder}: format {raw.get('format')!r}, this version reads {FORMAT!r}")
        names = {item.name for item in dataclasses.fields(AdapterConfig)}
        config = AdapterConfig(**{key: value for key, value in raw.items() if key in names})
        missing = [name for name in TENSORS if name not in tensors]
        if missing:
            raise ChassisError(f"{folder}: {FILES[0]} lacks {', '.join(missing)}; fit or copy the adapter again")
        adapter = cls(**{name: tensors[name] for name in (*TENSORS, "cols") if name in tensors}, config=config)
        if (adapter.config.width, adapter.config.rank) != (raw["width"], raw["rank"]):
            raise ChassisError(f"{folder}: config says {raw['width']} x {raw['rank']}, the tensors {list(adapter.U.shape)}")
        return adapter


def combine(parts: Sequence[tuple[float, Adapter]]) -> Adapter:
    """The adapter whose change is the weighted sum of the changes of `parts`, (weight, adapter); ranks add up.

    Its mean is the average of theirs, and its bias moved accordingly. Raises ChassisError for no parts, a weight that is
    not finite, or adapters of different bases.
    """
    if not parts or not all(math.isfinite(weight) for weight, _ in parts):
        raise ChassisError(f"weights {[weight for weight, _ in parts]}: expected one or more finite numbers")
    first = parts[0][1]
    for _, adapter in parts[1:]:
        config = adapter.config
        first.check_base(width=config.width, vocab_size=config.vocab_size, vocabulary_hash=config.vocabulary_hash)
    mean = torch.stack([adapter.mean for _, adapter in parts]).mean(0)
    biases = [adapter.bias + ((mean - adapter.mean) @ adapter.U) @ adapter.V for _, adapter in parts]
    same = all(adapter.cols is None for _, adapter in parts)
    sides = [(a.V, b) if same else a.in_vocabulary(a.V, b) for (_, a), b in zip(parts, biases, strict=True)]
    names = " + ".join(f"{weight:g} {adapter.config.expert}".strip() for weight, adapter in parts)
    unknown = float("nan")
    return Adapter(
        U=torch.cat([adapter.U for _, adapter in parts], 1),
        V=torch.cat([weight * v for (weight, _), (v, _) in zip(parts, sides, strict=True)]),
        bias=sum(weight * bias for (weight, _), (_, bias) in zip(parts, sides, strict=True)),
        mean=mean,
        constant=next((a.constant for _, a in parts if a.constant.any()), first.constant),
        config=dataclasses.replace(first.config, expert=names, kl=unknown, no_op_kl=unknown, data_fingerprint=""),
    )
