"""The logits [B, T_t, V_t] that a teacher in any form stands for: what the losses must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from chassis_kernels.reference.precision import compute_dtype
from chassis_kernels.teacher import LEAST_MASS, Teacher, TeacherHead


def logits(teacher: Teacher, n_teacher: int) -> Tensor:
    """[B, T_t, n_teacher]; logits as they are, else float32 (float64 if the teacher is)."""
    if isinstance(teacher, Tensor):
        return teacher[..., :n_teacher]
    if isinstance(teacher, TeacherHead):
        hidden, weight, bias, softcap = teacher
        dtype = compute_dtype(hidden, weight)
        z = hidden.to(dtype) @ weight[:n_teacher].to(dtype).T
        if bias is not None:
            z = z + bias[:n_teacher].to(dtype)
        return z if softcap is None else softcap * torch.tanh(z / softcap)
    listed = teacher.ids >= 0
    log_probs = teacher.log_probs.to(compute_dtype(teacher.log_probs))
    mass = 1 - torch.where(listed, log_probs.double().exp(), 0.0).sum(-1, keepdim=True)
    filler = mass.clamp_min(LEAST_MASS).log() - (n_teacher - listed.sum(-1, keepdim=True)).double().log()
    z = filler.to(log_probs.dtype).repeat(1, 1, n_teacher + 1)
    return z.scatter(-1, torch.where(listed, teacher.ids, n_teacher), log_probs)[..., :-1]
