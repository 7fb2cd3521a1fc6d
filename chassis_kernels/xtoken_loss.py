"""The cross-tokenizer distillation loss for plain tensors, on the fused kernels: usable from any training loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from chassis_kernels.chunks import next_token
from chassis_kernels.gold_kl import gold_kl
from chassis_kernels.parallel.groups import ONE_RANK, Parallel
from chassis_kernels.projection_kl import cross_entropy, projection_kl
from chassis_kernels.reference import xtoken_loss as reference
from chassis_kernels.reference.teacher import logits as teacher_logits
from chassis_kernels.reference.xtoken_loss import TeacherBatch
from chassis_kernels.teacher import check_teacher
from chassis_kernels.token_kl import token_kl
from chassis_kernels.xtoken_config import XTokenConfig


def xtoken_loss(
    student_logits: Tensor,  # [B, T_s, >= V_s]
    teachers: Sequence[TeacherBatch],
    config: XTokenConfig,
    *,
    input_ids: Tensor | None = None,  # [B, T_s] int64
    token_mask: Tensor,  # [B, T_s], 0 at padding
    sample_mask: Tensor | None = None,  # [B], 0: the sample does not count
    labels: Tensor | None = None,  # [B, T_s] int64, the token after each position, -1: does not count
    global_valid_tokens: Tensor | float | None = None,
    group: dist.ProcessGroup | None = None,
    parallel: Parallel = ONE_RANK,
    eager: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss [] in nats, and detached metrics: loss, kl_loss, ce_loss, kl_loss_scale, accuracy, num_valid_samples, and per
    teacher i `kl_loss_t{i}`, `weight_t{i}`, `proj_accuracy_t{i}`, `num_valid_pairs_t{i}` (gold: `kl_common_t{i}`,
    `l1_uncommon_t{i}`, `num_valid_chunks_t{i}`) or `selected_teacher`.

    global_valid_tokens counts the next-token positions of the whole optimizer step (None: those of this call), as
    TeacherBatch.global_valid_chunks counts chunks. With `group`, chunk counts and teachers' scores are summed over ranks
    that hold other batches. `parallel`: the ranks over which this batch's vocabulary and sequence are spread, each holding
    its part of all [B, T] inputs; the loss is then the same on all of them, where those of `group` add up to the batch's.
    labels None: what input_ids and token_mask say of the next position. A rank that holds part of a sequence cannot know
    it: there labels, also those of a teacher that is scored by CE, and shifted chunks are needed.
    `eager` runs PyTorch expressions under autograd instead of the fused kernels: float64-capable, second derivatives.

    Differentiable in student_logits. Raises ValueError for inputs that do not fit the configuration.
    """
    _check(student_logits, teachers, config, input_ids, token_mask, sample_mask, labels, parallel)
    if eager and parallel.sharded:
        raise ValueError("eager=True is for logits that are whole: leave it out with parallel")
    if sample_mask is None:
        sample_mask = token_mask.new_ones(len(token_mask))
    if global_valid_tokens is None:
        counted = next_token(token_mask) != 0 if labels is None else labels >= 0
        global_valid_tokens = parallel.sequence_sum(counted[sample_mask != 0].sum())
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    n_tokens = torch.as_tensor(global_valid_tokens, dtype=dtype, device=student_logits.device)
    student = reference.StudentBatch(student_logits, input_ids, token_mask, sample_mask, n_tokens, labels)

    def group_sum(total: Tensor) -> Tensor:
        if group is not None:
            dist.all_reduce(total, group=group)
        return total

    if eager:
        teachers = [_with_logits(t, its.vocab_size) for t, its in zip(teachers, config.teachers, strict=True)]
    kernels = reference.EAGER if eager else reference.Kernels(projection_kl, gold_kl, token_kl, cross_entropy)
    return reference.compose(student_logits, config, student, teachers, kernels, group_sum, parallel)


def _with_logits(teacher: TeacherBatch, size: int) -> TeacherBatch:
    return teacher if isinstance(teacher.logits, Tensor) else teacher._replace(logits=teacher_logits(teacher.logits, size))


def needs_logits(config: XTokenConfig, i: int) -> str:
    """What in the configuration reads more of teacher i than its largest columns; empty: nothing."""
    for name in ("averaged_logits", "select_teacher"):
        if config.kd_loss_mode == name:
            return f"kd_loss_mode={name!r}"
    if config.sum_weights_metric is not None:
        return f"sum_weights_metric={config.sum_weights_metric!r}"
    if config.uses_gold(i) and not config.teachers[i].same_tokenizer:
        return "gold_loss"
    return ""


def _check(logits, teachers, config, input_ids, token_mask, sample_mask, labels, parallel) -> None:
    if logits.dim() != 3 or parallel.head(logits) < config.student_vocab_size:
        raise ValueError(f"student_logits has shape {tuple(logits.shape)}, expected [B, T, >= {config.student_vocab_size}]")
    split = parallel.sequence_shards > 1
    if labels is None and (split or input_ids is None):
        raise ValueError(f"labels are missing: {'a sharded sequence needs them' if split else 'give them or input_ids'}")
    for name, tensor in (("input_ids", input_ids), ("token_mask", token_mask), ("labels", labels)):
        if tensor is not None and tensor.shape != logits.shape[:2]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(logits.shape[:2])}")
    if sample_mask is not None and sample_mask.shape != logits.shape[:1]:
        raise ValueError(f"sample_mask has shape {tuple(sample_mask.shape)}, expected ({logits.shape[0]},)")
    if len(teachers) != len(config.teachers):
        raise ValueError(f"{len(teachers)} teachers given, but the configuration names {len(config.teachers)}")
    for i, (teacher, its) in enumerate(zip(teachers, config.teachers, strict=True)):
        try:
            positions = check_teacher(teacher.logits, its.vocab_size)
        except ValueError as error:
            raise ValueError(f"teacher {i}: {error}") from None
        whole = needs_logits(config, i)
        if whole and not isinstance(teacher.logits, Tensor):
            kind = type(teacher.logits).__name__
            raise ValueError(f"teacher {i} is a {kind}, but {whole} needs its logits over the whole vocabulary: give those")
        scored = config.kd_loss_mode == "select_teacher" or config.sum_weights_metric == "ce"
        if scored and split and teacher.input_ids is not None and teacher.labels is None:
            raise ValueError(f"teacher {i} is scored on its own tokens, of which this rank has a part: it needs labels")
        if its.same_tokenizer:
            if tuple(positions) != logits.shape[:2]:
                raise ValueError(
                    f"teacher {i} shares the student's tokenizer, but has {tuple(positions)} positions and the student "
                    f"{tuple(logits.shape[:2])}"
                )
            continue
        if teacher.projection is None or teacher.chunks is None:
            raise ValueError(f"teacher {i} has its own tokenizer: it needs a projection and chunks")
        if teacher.projection.shape != (config.student_vocab_size, its.vocab_size):
            raise ValueError(
                f"teacher {i}: the projection is {teacher.projection.shape}, the tokenizers are "
                f"{(config.student_vocab_size, its.vocab_size)}"
            )
        if scored and teacher.labels is None and (teacher.input_ids is None or teacher.token_mask is None):
            raise ValueError(f"teacher {i} is scored on its own tokens: it needs labels, or input_ids and token_mask")
