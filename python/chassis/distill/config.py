"""What `chassis distill` is told: a YAML file, `key=value` overrides, contradictions refused before a model loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from chassis.errors import ChassisError
from chassis_kernels.xtoken_config import METRICS, MODES, TeacherConfig, XTokenConfig

PRECISIONS = ("float32", "bfloat16")
UNITS = ("tokens", "characters")


@dataclass
class Teacher:
    """A `model` (folder or hub name) that runs beside the student, or a `cache` folder with its distributions.

    With both, `chassis distill cache` writes the cache, and training reads it and leaves the model alone.
    `projection`: a projection file; "counted" to estimate one on the training text; "tokenizers" to build one from the two
    tokenizers alone; "auto" for counted, or for tokenizers under gold_loss, which needs pinned pairs; null for the student's
    own tokenizer.
    `offload` keeps the model on the CPU but for its own forward pass. Where the loss compares fewer columns than the teacher
    has, the model gives hidden states, and [T, V_t] logits never exist; `full_logits` keeps them all the same.
    """

    model: str | None = None
    cache: str | None = None
    projection: str | None = "auto"
    weight: float = 1.0
    gold_loss: bool | None = None
    xtoken_loss: bool | None = None
    offload: bool = False
    full_logits: bool = False


@dataclass
class Data:
    """Documents as `chassis.text.corpus.load_documents` reads them, joined by newlines up to `pack_length` characters or
    tokens of the student, and cut to `max_tokens` tokens of either tokenizer."""

    train: list[str] = MISSING
    validation: list[str] = field(default_factory=list)
    text_column: str = "text"
    split: str = "train"
    pack_by: str = "characters"
    pack_length: int = 16384
    max_tokens: int = 2048
    max_documents: int | None = None
    max_validation_samples: int | None = None


# Options of the loss under their own names and defaults; the sizes and the teachers come from elsewhere in the file.
_TYPES = get_type_hints(XTokenConfig)
Loss = dataclasses.make_dataclass(
    "Loss",
    [(o.name, _TYPES[o.name], o.default) for o in dataclasses.fields(XTokenConfig) if o.default is not dataclasses.MISSING],
    namespace={"__doc__": "Options of `chassis_kernels.xtoken_loss`, under its names."},
)


@dataclass
class Training:
    """The optimizer's steps. `batch_size` samples a step over all ranks, `micro_batch_size` of them in one forward pass.

    `fsdp` shards the student, its gradients and the optimizer's state over the ranks of torchrun, in place of DDP.
    `fused_head` makes the student's logits a block of rows at a time inside the loss, so that neither they nor their
    gradient are ever whole; for one teacher of another tokenizer, without gold_loss.
    """

    steps: int = 1000
    batch_size: int = 64
    micro_batch_size: int = 1
    learning_rate: float = 5e-5
    weight_decay: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 250
    warmup_start: float = 0.02
    max_grad_norm: float = 1.0
    precision: str = "float32"
    activation_checkpointing: bool = False
    fsdp: bool = False
    fused_head: bool = False
    evaluate_every: int = 100
    save_every: int = 100
    log_every: int = 1
    workers: int = 0
    seed: int = 0
    device: str = "cpu"


@dataclass
class CacheOptions:
    """`chassis distill cache`: how much of each teacher's distribution is kept."""

    top_k: int = 64
    samples_per_shard: int = 256


@dataclass
class DistillConfig:
    """The whole file."""

    student: str = MISSING
    out: str = MISSING
    teachers: list[Teacher] = MISSING
    data: Data = field(default_factory=Data)
    loss: Loss = field(default_factory=Loss)
    training: Training = field(default_factory=Training)
    cache: CacheOptions = field(default_factory=CacheOptions)

    def check(self, ranks: int = 1) -> None:
        """Raise ChassisError for what can be told before any tokenizer or model is loaded."""
        train = self.training
        for name in ("steps", "batch_size", "micro_batch_size", "evaluate_every", "save_every", "log_every"):
            if getattr(train, name) < 1:
                raise ChassisError(f"training.{name} is {getattr(train, name)}: expected at least 1")
        if train.batch_size % (ranks * train.micro_batch_size):
            raise ChassisError(
                f"training.batch_size {train.batch_size} cannot be cut into micro-batches of {train.micro_batch_size} on "
                f"{ranks} ranks: expected a multiple of {ranks * train.micro_batch_size}"
            )
        if train.fsdp and ranks == 1:
            raise ChassisError("training.fsdp shards over several processes: start it with torchrun --nproc-per-node N")
        if train.fsdp and train.fused_head:
            raise ChassisError("training.fused_head needs a head that is whole, and training.fsdp shards it: choose one")
        for name, value, known in (
            ("training.precision", train.precision, PRECISIONS),
            ("data.pack_by", self.data.pack_by, UNITS),
            ("loss.kd_loss_mode", self.loss.kd_loss_mode, MODES),
            ("loss.sum_weights_metric", self.loss.sum_weights_metric, METRICS),
        ):
            if value not in known:
                raise ChassisError(f"{name} is {value!r}: expected one of {', '.join(map(str, known))}")
        for name, value in (("pack_length", self.data.pack_length), ("max_tokens", self.data.max_tokens)):
            if value < 2:
                raise ChassisError(f"data.{name} is {value}: expected at least 2")
        if not self.data.train:
            raise ChassisError("data.train is empty: name at least one source of documents")
        if not self.teachers:
            raise ChassisError("teachers is empty: name at least one")
        for i, teacher in enumerate(self.teachers):
            if teacher.model is None and teacher.cache is None:
                raise ChassisError(f"teachers.{i}: expected a model, a cache, or both")
        # The contradictions among the loss's own options, whatever the vocabularies turn out to be.
        self.loss_config(2, [2] * len(self.teachers), [t.projection is None for t in self.teachers])

    def loss_config(self, student_vocab_size: int, vocab_sizes: Sequence[int], same: Sequence[bool]) -> XTokenConfig:
        """The loss's configuration, with the sizes of the tokenizers; ChassisError where options contradict each other."""
        try:
            teachers = [
                TeacherConfig(size, own, t.weight, t.gold_loss, t.xtoken_loss)
                for size, own, t in zip(vocab_sizes, same, self.teachers, strict=True)
            ]
            found = XTokenConfig(student_vocab_size, tuple(teachers), **vars(self.loss))
        except ValueError as error:
            raise ChassisError(f"loss: {error}") from error
        if self.training.fused_head and (reason := _needs_student_logits(found)):
            raise ChassisError(f"training.fused_head: {reason}")
        return found


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> DistillConfig:
    """Read a YAML file and apply `key=value` overrides such as `training.steps=50` or `teachers.0.weight=0.5`.

    Raises ChassisError for a file that cannot be read, for an unknown key (with the nearest known one) and for a value of
    the wrong type.
    """
    where = str(path)
    try:
        config = OmegaConf.structured(DistillConfig)
        if path is not None:
            loaded = OmegaConf.load(path)
            if not OmegaConf.is_dict(loaded):
                raise ChassisError(f"{path}: expected keys and values such as student: owner/model")
            config = OmegaConf.merge(config, loaded)
        for override in overrides:
            key, equals, text = override.partition("=")
            where = f"override {override!r}"
            if not equals or not key:
                raise ChassisError(f"{override!r}: expected key=value, for instance training.steps=50")
            value = OmegaConf.select(OmegaConf.from_dotlist([f"value={text}"]), "value")
            OmegaConf.update(config, key, value)
        found = OmegaConf.to_object(config)
    except (OmegaConfBaseException, TypeError, AttributeError, IndexError) as error:
        raise ChassisError(f"{where}: {_explain(error)}") from error
    except OSError as error:
        raise ChassisError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ChassisError(f"{path}: not YAML ({_first_line(error)})") from error
    return found


def _needs_student_logits(config: XTokenConfig) -> str:
    """Why the loss cannot be made of the student's hidden states; empty: it can."""
    if len(config.teachers) > 1 or config.teachers[0].same_tokenizer:
        return "it takes one teacher, with another tokenizer than the student's"
    if config.uses_gold(0):
        return "gold_loss compares all logits: leave it out"
    if config.kd_loss_mode != "sum" or config.sum_weights_metric is not None:
        return "it takes kd_loss_mode sum without sum_weights_metric"
    if config.compat and config.dynamic_loss_scaling:
        return "compat takes each micro-batch's own |CE| / |KD|: set dynamic_loss_scaling=false"
    for name, value in (("kl_loss_weight", config.kl_loss_weight), ("the teacher's weight", config.teachers[0].weight)):
        if value <= 0:
            return f"{name} is {value}: expected more than 0"
    return ""


def _explain(error: Exception) -> str:
    first = _first_line(error)
    key = getattr(error, "full_key", None)
    return f"{key}: {first}" if key and key not in first else first


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
