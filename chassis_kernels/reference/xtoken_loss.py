"""The whole distillation loss: KD from one or several teachers, whatever their tokenizers, plus next-token CE. Eager.

loss = |CE| / |KD| · KD + CE with dynamic scaling (the factor detached), else kl_loss_weight · KD + ce_loss_scale · CE
KD   = Σ_i w_i KD_i            sum: static weights, or softmax(alpha · scores) over the teachers
     | KD of Σ w_i z_i / Σ w   averaged_logits: when every teacher shares tokenizer and shapes; else the static sum
     | KD_i of the best i      select_teacher: lowest next-token CE on the teacher's own tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from chassis_kernels.chunks import Chunks, layout, next_token
from chassis_kernels.parallel.groups import ONE_RANK, Parallel
from chassis_kernels.reference import gold_kl, projection_kl, token_kl
from chassis_kernels.reference.precision import compute_dtype, without_autocast
from chassis_kernels.sparse import SparseProjection
from chassis_kernels.teacher import Teacher
from chassis_kernels.xtoken_config import XTokenConfig

Metrics = dict[str, Tensor]


class Kernels(NamedTuple):
    """What runs the parts; each takes the arguments of its namesake in chassis_kernels."""

    projection_kl: Callable
    gold_kl: Callable = gold_kl.loss
    token_kl: Callable = token_kl.loss
    cross_entropy: Callable = projection_kl.cross_entropy


EAGER = Kernels(projection_kl.loss)


class TeacherBatch(NamedTuple):
    """One teacher's logits of a micro-batch and what is needed to use them. Same tokenizer: logits alone will do.

    In place of logits a TeacherHead or TopK, where only the teacher's largest columns enter: P-KL and same-tokenizer KL.
    """

    logits: Teacher  # [B, T_t, >= V_t]
    projection: SparseProjection | None = None
    chunks: Chunks | None = None
    input_ids: Tensor | None = None  # [B, T_t]; None: the student's
    token_mask: Tensor | None = None  # [B, T_t]; None: the student's
    global_valid_chunks: Tensor | float | None = None  # chunks that count in the whole optimizer step
    labels: Tensor | None = None  # [B, T_t] the token after each position, -1: does not count; None: from the two above


class StudentBatch(NamedTuple):
    """The student's side, with the masks and the step-wide number of tokens."""

    logits: Tensor  # [B, T_s, >= V_s]
    input_ids: Tensor | None  # [B, T_s]
    token_mask: Tensor  # [B, T_s]
    sample_mask: Tensor  # [B]
    global_valid_tokens: Tensor  # next-token positions that count in the whole optimizer step
    labels: Tensor | None = None  # [B, T_s] the token after each position, -1: does not count; None: from the two above


class Step(NamedTuple):
    config: XTokenConfig
    student: StudentBatch
    teachers: Sequence[TeacherBatch]
    group_sum: Callable[[Tensor], Tensor]
    kernels: Kernels
    parallel: Parallel

    def mask(self) -> Tensor:
        """Next-token weights of the student, [B, T_s]."""
        student, dtype = self.student, compute_dtype(self.student.logits)
        if student.labels is not None:
            return (student.labels >= 0).to(dtype) * student.sample_mask.to(dtype)[:, None]
        return token_kl.next_token_mask(student.token_mask, student.sample_mask, dtype)

    def labels(self) -> Tensor:
        """The token that each position predicts, -1 where it does not count, [B, T_s]."""
        labels = self.student.labels
        return torch.where(self.mask() != 0, next_token(self.student.input_ids) if labels is None else labels, -1)

    def teacher_labels(self, i: int) -> Tensor:
        """The same of teacher i, [B, T_t]."""
        student, teacher = self.student, self.teachers[i]
        labels = student.labels if teacher.input_ids is None and teacher.labels is None else teacher.labels
        if labels is not None:
            return torch.where((student.sample_mask != 0)[:, None], labels, -1)
        ids = student.input_ids if teacher.input_ids is None else teacher.input_ids
        return torch.where(next_token(self.real(i)), next_token(ids), -1)

    def logits(self) -> tuple[Tensor, dict]:
        """The student's, over its tokens: [B, T_s, V_s]; and how they are spread, for a kernel."""
        logits, parallel = self.parallel.cut(self.student.logits, self.config.student_vocab_size)
        return logits, parallel.options

    def real(self, i: int) -> Tensor:
        """Positions of teacher i that are neither padding nor of a masked sample, [B, T_t] bool."""
        own = self.teachers[i].token_mask
        return ((self.student.token_mask if own is None else own) != 0) & (self.student.sample_mask != 0)[:, None]

    def column_mask(self, i: int) -> Tensor | None:
        return None if self.config.compat else self.real(i)


@without_autocast
def compose(
    logits: Tensor,
    config: XTokenConfig,
    student: StudentBatch,
    teachers: Sequence[TeacherBatch],
    kernels: Kernels,
    group_sum: Callable[[Tensor], Tensor] = lambda total: total,
    parallel: Parallel = ONE_RANK,
) -> tuple[Tensor, Metrics]:
    """Loss [] and detached metrics. `group_sum` adds a tensor over the ranks of other batches, `parallel` has those of this
    one; every rank must make every call."""
    step = Step(config, student, teachers, group_sum, kernels, parallel)
    kd, metrics, predicted = _mode(step)
    if predicted is None:
        predicted = kernels.cross_entropy(logits, step.labels(), config.student_vocab_size, **parallel.options)
    n_tokens = student.global_valid_tokens
    ce, accuracy = (parallel.sequence_sum(token_kl.per_token(rows, step.mask(), n_tokens)) for rows in predicted)
    loss, factor = combine(config, kd, ce)
    samples = torch.ones_like(student.sample_mask) if config.compat else student.sample_mask != 0
    overall = {
        "loss": loss.detach(),
        "kl_loss": kd.detach(),
        "ce_loss": ce.detach(),
        "kl_loss_scale": factor,
        "accuracy": accuracy,
        "num_valid_samples": samples.sum(),
    }
    return loss, overall | metrics


def combine(config: XTokenConfig, kd: Tensor, ce: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the factor on KD: |CE| / |KD| detached (1 where KD is 0) and CE whole, or the two fixed weights."""
    if not config.dynamic_loss_scaling:
        return config.kl_loss_weight * kd + config.ce_loss_scale * ce, kd.detach().new_tensor(config.kl_loss_weight)
    size = kd.detach().abs()
    factor = torch.where(size > 0, ce.detach().abs() / torch.where(size > 0, size, 1.0), 1.0)
    return factor * kd + ce, factor


Predicted = tuple[Tensor, Tensor]  # nll and correct of every position of the student, [B, T_s]


def _mode(step: Step) -> tuple[Tensor, Metrics, Predicted | None]:
    """KD with its metrics, and what a kernel found out about the labels on its way through the student's logits."""
    config, teachers = step.config, step.teachers
    if config.kd_loss_mode == "select_teacher":
        best = int(_scores(step, "ce").argmax())
        kd, metrics, predicted = _teacher(step, best, step.labels())
        return kd, metrics | {"selected_teacher": torch.as_tensor(best)}, predicted
    if config.kd_loss_mode == "averaged_logits" and _same_shapes(step):
        (student, spread), weights = step.logits(), [t.weight for t in config.teachers]
        mean = token_kl.averaged_logits([t.logits[..., : config.student_vocab_size] for t in teachers], weights)
        return step.kernels.token_kl(student, mean, step.mask(), **_token_options(step), **spread), {}, None
    weights = step.student.logits.new_tensor([t.weight for t in config.teachers], dtype=torch.float64)
    if config.sum_weights_metric:
        weights = torch.softmax(config.alpha * _scores(step, config.sum_weights_metric), 0)
    kd, metrics, predicted = 0.0, {}, None
    for i in range(len(teachers)):
        one, its_metrics, its_predicted = _teacher(step, i, step.labels() if predicted is None else None)
        predicted = its_predicted if predicted is None else predicted
        weight = weights[i].to(one.dtype)
        kd = kd + weight * config.vocabulary_scale(i) * one
        metrics |= its_metrics | {f"weight_t{i}": weight}
    return kd, metrics, predicted


def _teacher(step: Step, i: int, labels: Tensor | None) -> tuple[Tensor, Metrics, Predicted | None]:
    """KD of teacher i with its metrics, suffixed; P-KL also looks at the labels."""
    config, teacher, student, predicted = step.config, step.teachers[i], step.student, None
    own, spread = step.logits()
    if config.teachers[i].same_tokenizer:
        options = _token_options(step) | {"vocab_topk": config.vocab_topk, "column_mask": step.column_mask(i)}
        kd, metrics = step.kernels.token_kl(own, teacher.logits, step.mask(), **options, **spread), {}
    else:
        common = {
            "temperature": config.temperature,
            "sample_mask": student.sample_mask,
            "denominator": _denominator(step, i),
        }
        arguments = teacher.logits, teacher.projection, teacher.chunks
        if config.uses_gold(i):
            common |= {"uncommon_topk": config.uncommon_topk, "relaxed": config.uses_relaxed(i)}
            kd, metrics = step.kernels.gold_kl(own, *arguments, **common, reverse=config.reverse_kl, **spread)
        else:
            common |= {"vocab_topk": config.vocab_topk, "exact_only": config.exact_token_match_only}
            common |= {"divergence": "reverse" if config.reverse_kl else "forward", "column_mask": step.column_mask(i)}
            common |= {"labels": labels, **step.parallel.options}
            kd, stats = step.kernels.projection_kl(student.logits, *arguments, **common)
            metrics = {"proj_accuracy": stats.accuracy, "num_valid_pairs": stats.valid_pairs}
            predicted = None if labels is None else (stats.nll, stats.correct)
    metrics = {f"{name}_t{i}": value for name, value in ({"kl_loss": kd.detach()} | metrics).items()}
    return kd, metrics, predicted


def _denominator(step: Step, i: int) -> Tensor | float:
    """Chunks that count: of the step if given, else of this micro-batch; over all ranks, before any early exit."""
    config, teacher = step.config, step.teachers[i]
    if teacher.global_valid_chunks is not None and not config.compat:
        return teacher.global_valid_chunks
    exact = config.exact_token_match_only and not config.uses_gold(i)
    plan = layout(teacher.chunks, step.student.sample_mask, exact, torch.float64, step.parallel)
    return step.group_sum(plan.counted.sum().to(torch.float64))


def _token_options(step: Step) -> dict:
    config = step.config
    n_tokens = step.student.global_valid_tokens
    return {"temperature": config.temperature, "reverse": config.reverse_kl, "n_tokens": n_tokens}


def _scores(step: Step, metric: str) -> Tensor:
    """Mean score of each teacher on its own tokens over all ranks, [n_teachers] float64."""
    sums = []
    for i, teacher in enumerate(step.teachers):
        logits, real = teacher.logits.detach(), step.real(i)
        size = logits.shape[-1] if step.config.compat else step.config.teachers[i].vocab_size
        if metric == "ce":
            labels = step.teacher_labels(i)
            score, real = -step.kernels.cross_entropy(logits, labels, size)[0], labels >= 0
        else:
            score = token_kl.confidence(metric, logits, real, size)
        sums.append(torch.stack([score.sum(), real.sum()]).double())
    total = step.group_sum(step.parallel.sequence_sum(torch.stack(sums)))
    scale = total.new_tensor([step.config.vocabulary_scale(i) for i in range(len(sums))])
    return total[:, 0] / total[:, 1].clamp_min(1) * scale


def _same_shapes(step: Step) -> bool:
    shapes = {t.logits.shape for t in step.teachers}
    return len(shapes) == 1 and all(t.same_tokenizer for t in step.config.teachers)
