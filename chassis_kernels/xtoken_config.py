"""What the cross-tokenizer loss can be asked to do, with every contradiction refused before anything large is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MODES = ("sum", "averaged_logits", "select_teacher")
METRICS = (None, "ce", "entropy", "max_prob")


@dataclass(frozen=True)
class TeacherConfig:
    """One teacher. `same_tokenizer` teachers need no projection; gold_loss and xtoken_loss None: the global value."""

    vocab_size: int
    same_tokenizer: bool = False
    weight: float = 1.0
    gold_loss: bool | None = None
    xtoken_loss: bool | None = None


@dataclass(frozen=True)
class XTokenConfig:
    """Options of `xtoken_loss`. Raises ValueError, at construction, for values that contradict each other.

    compat: the published system's numbers instead of better defaults: the chunk count of this micro-batch normalises the KD
    term, and padding and masked samples help choose the columns.
    """

    student_vocab_size: int
    teachers: tuple[TeacherConfig, ...]
    gold_loss: bool = False
    xtoken_loss: bool = False
    temperature: float = 1.0
    vocab_topk: int = 8192
    uncommon_topk: int = 8192
    reverse_kl: bool = False
    exact_token_match_only: bool = False
    kl_loss_weight: float = 1.0
    ce_loss_scale: float = 0.1
    dynamic_loss_scaling: bool = True
    kd_loss_mode: str = "sum"
    sum_weights_metric: str | None = None
    alpha: float = 1.0
    normalize_teacher_by_vocab: bool = False
    compat: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "teachers", tuple(self.teachers))
        if not self.teachers:
            raise ValueError("teachers is empty: name at least one")
        self._check_numbers()
        self._check_mode()
        for i, teacher in enumerate(self.teachers):
            self._check_teacher(i, teacher)

    def uses_gold(self, i: int) -> bool:
        """Whether teacher i's cross-tokenizer loss is gold rather than P-KL."""
        own = self.teachers[i].gold_loss
        return self.gold_loss if own is None else own

    def uses_relaxed(self, i: int) -> bool:
        """Whether teacher i's gold map is the relaxed one (H-KL)."""
        own = self.teachers[i].xtoken_loss
        return self.xtoken_loss if own is None else own

    def vocabulary_scale(self, i: int) -> float:
        """log V_t,i / log min_j V_t,j with normalize_teacher_by_vocab, else 1."""
        if not self.normalize_teacher_by_vocab:
            return 1.0
        return math.log(self.teachers[i].vocab_size) / math.log(min(t.vocab_size for t in self.teachers))

    @classmethod
    def from_lists(
        cls,
        student_vocab_size: int,
        teacher_vocab_sizes: Sequence[int],
        same_tokenizer: Sequence[bool],
        *,
        teacher_weights: Sequence[float] | None = None,
        teacher_gold_loss: Sequence[bool | None] | None = None,
        teacher_xtoken_loss: Sequence[bool | None] | None = None,
        **options,
    ) -> XTokenConfig:
        """The same from one list per teacher property; lists of different lengths are refused."""
        n = len(teacher_vocab_sizes)
        lists = {
            "same_tokenizer": same_tokenizer,
            "teacher_weights": [1.0] * n if teacher_weights is None else teacher_weights,
            "teacher_gold_loss": [None] * n if teacher_gold_loss is None else teacher_gold_loss,
            "teacher_xtoken_loss": [None] * n if teacher_xtoken_loss is None else teacher_xtoken_loss,
        }
        for name, values in lists.items():
            if len(values) != n:
                raise ValueError(f"{name} has {len(values)} entries for {n} teacher vocabularies: give one each")
        teachers = (TeacherConfig(*values) for values in zip(teacher_vocab_sizes, *lists.values(), strict=True))
        return cls(student_vocab_size, tuple(teachers), **options)

    def _check_numbers(self) -> None:
        for name in ("temperature", "alpha", "kl_loss_weight", "ce_loss_scale"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value}: expected a finite number")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}: expected a positive number")
        for name in ("vocab_topk", "uncommon_topk", "student_vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")

    def _check_mode(self) -> None:
        if self.kd_loss_mode not in MODES:
            raise ValueError(f"kd_loss_mode is {self.kd_loss_mode!r}: expected one of {', '.join(MODES)}")
        if self.sum_weights_metric not in METRICS:
            raise ValueError(f"sum_weights_metric is {self.sum_weights_metric!r}: expected None, ce, entropy or max_prob")
        if self.kd_loss_mode != "sum":
            if self.sum_weights_metric is not None:
                raise ValueError(f"sum_weights_metric={self.sum_weights_metric!r} needs kd_loss_mode='sum'")
            if self.normalize_teacher_by_vocab:
                raise ValueError("normalize_teacher_by_vocab needs kd_loss_mode='sum'")
        if self.xtoken_loss and not self.gold_loss:
            raise ValueError("xtoken_loss relaxes the gold map: it needs gold_loss=True")
        if self.kd_loss_mode == "averaged_logits" and sum(t.weight for t in self.teachers) == 0:
            raise ValueError("the teachers' weights sum to 0: kd_loss_mode='averaged_logits' divides by their sum")

    def _check_teacher(self, i: int, teacher: TeacherConfig) -> None:
        if teacher.vocab_size < 1 or (self.normalize_teacher_by_vocab and teacher.vocab_size < 2):
            raise ValueError(f"teacher {i} has vocab_size {teacher.vocab_size}: too small")
        if not math.isfinite(teacher.weight):
            raise ValueError(f"teacher {i} has weight {teacher.weight}: expected a finite number")
        if self.kd_loss_mode != "sum" and (teacher.gold_loss, teacher.xtoken_loss) != (None, None):
            raise ValueError(f"teacher {i} overrides gold_loss or xtoken_loss: that needs kd_loss_mode='sum'")
        if self.uses_relaxed(i) and not self.uses_gold(i):
            raise ValueError(f"teacher {i} has xtoken_loss without gold_loss: set gold_loss too")
        if teacher.same_tokenizer and teacher.vocab_size != self.student_vocab_size:
            raise ValueError(
                f"teacher {i} has {teacher.vocab_size} tokens and the student {self.student_vocab_size}: without a "
                "projection the tokenizers must be the same"
            )
