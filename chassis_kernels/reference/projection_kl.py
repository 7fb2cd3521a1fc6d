"""KL between a teacher and a student with another tokenizer, chunk by chunk, through a sparse projection M [V_s, V_t].

Within the teacher's columns J [k], for a chunk covered by the student rows S and the teacher rows T:

    a = Σ_s pbar[s] M[s, J],  pbar = mean over S of softmax(z_s / τ)          r = a / (Σa + ε),  l = log(r + ε)
    Q = mean over T of log_softmax(z_t[J] / τ)                                ε = 1e-10, means divide by (count + ε)

    forward  Σ_j exp(Q)(Q - l)                          g = dKL/dr = -exp(Q) / (r + ε)
    reverse  Σ_j exp(l)(l - Q)                          g = 1 + l - Q
    js       ½ Σ_j u log(u / m) + v log(v / m)          g = ½ log(u / m)

Jensen-Shannon compares u = r + ε with v = exp(Q) / (Σ exp(Q) + ε) + ε through m = (u + v) / 2. It is finite whatever is 0,
never negative, the same with r and v - ε exchanged, and at most (1 + k ε) log 2: log 2 to rounding.

With `tail` there is one more outcome, the mass outside J, and the sums above run over k + 1 outcomes:

    a[k] = max(0, 1 - Σ_{j<k} a[j]),   Q[k] = mean over T of log(Σ_{j not in J} q_j + ε),   q = softmax(z_t[:V_t] / τ)

and Q[j] = mean over T of log q_j: the teacher is normalised over its V_t tokens, not within J.

Backward, with G = (g - Σ g r) / (Σa + ε) / (count + ε), with `tail` less G[k] where a[k] > 0 (a[k] falls as a[j] rises):

    dKL/dz[t, s] = p_t[s] / τ (Σ_{j in J} M[s, j] G[j] - Σ_s' p_t[s'] Σ_j M[s', j] G[j])

The next-token loss of a row that has a label y comes from the same read: nll = -log softmax(z)[y], at temperature 1, and
dnll/dz[s] = softmax(z)[s] - [s = y].

The projection of a mean is the mean of projections, so chunks are projected, not rows. Method: "x-token" distillation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from chassis_kernels.chunks import COUNT_EPS, Chunks, Layout, chunk_means, counts, layout, only
from chassis_kernels.reference.precision import compute_dtype, without_autocast
from chassis_kernels.sparse import Edges, SparseProjection, slice_columns

EPS = 1e-10
DIVERGENCES = ("forward", "reverse", "js")  # their places are the op's codes


class ProjectionKLStats(NamedTuple):
    """What the loss also knows. Only nll has a gradient, and that not with a grad_buffer."""

    accuracy: Tensor  # [] share of the paired chunks where student and teacher prefer the same column of J
    valid_pairs: Tensor  # [] int64 chunks that enter the loss
    chunk_kl: Tensor  # [B, C] nats, 0 where there is no pair; neither weighted nor scaled by τ²
    columns: Tensor  # [k] int64, J
    nll: Tensor | None = None  # [B, T_s] nats, 0 without a label; None: no labels given
    correct: Tensor | None = None  # [B, T_s] bool: no logit is above the label's; None: no labels, or a grad_buffer


def loss(
    student_logits: Tensor,  # [B, T_s, >= V_s]
    teacher_logits: Tensor,  # [B, T_t, V_t]
    projection: SparseProjection,
    chunks: Chunks,
    *,
    temperature: float = 1.0,
    vocab_topk: int = 8192,
    divergence: str = "forward",
    tail: bool = False,
    exact_only: bool = False,
    sample_mask: Tensor | None = None,
    column_mask: Tensor | None = None,
    columns: Tensor | None = None,
    denominator: Tensor | float | None = None,
    labels: Tensor | None = None,
    label_weight: Tensor | None = None,
    op: Callable | None = None,
    select: Callable | None = None,
) -> tuple[Tensor, ProjectionKLStats]:
    """`chassis_kernels.projection_kl` with `op` and `select` as its two kernels: the eager ones below unless named."""
    plan = layout(chunks, sample_mask, exact_only, compute_dtype(student_logits, teacher_logits))
    weight = chunk_weights(plan, temperature, denominator)
    if columns is None:
        columns = choose_columns(teacher_logits, projection, column_mask, vocab_topk, select or top_columns)
    options = float(temperature), DIVERGENCES.index(divergence), tail
    arguments = op_arguments(student_logits, teacher_logits, projection, plan, columns, labels, options)
    kl, agree, nll, row_max, *_ = (op or projection_kl)(*arguments)
    total = weighted_sum(kl, weight)
    if label_weight is not None:
        total = total + weighted_sum(nll, label_weight.flatten().to(nll.dtype))
    found = stats(plan, kl, agree, chunks, columns)
    if labels is not None:
        found = found._replace(nll=nll.view(labels.shape), correct=_correct(student_logits, labels, row_max))
    return total, found


def cross_entropy(logits: Tensor, labels: Tensor, size: int, op: Callable | None = None) -> tuple[Tensor, Tensor]:
    """nll and correct of ProjectionKLStats for logits [B, T, >= size], by the same op, with nothing to compare."""
    rows, none = logits.flatten(0, 1), labels.new_zeros(0)
    projection = labels.new_zeros(1), none.to(torch.int32), none.to(torch.float32)
    chunks = torch.full_like(labels.flatten(), -1), none
    _, _, nll, row_max, *_ = (op or projection_kl)(
        rows, rows.detach()[:0], *projection, none, *chunks, labels.flatten(), size, 0, 1.0, 0, False
    )
    return nll.view(labels.shape), _correct(logits, labels, row_max)


def _correct(logits: Tensor, labels: Tensor, row_max: Tensor) -> Tensor:
    """[B, T] bool: there is a label and no logit is above it."""
    at_label = logits.detach().gather(2, labels.clamp_min(0)[..., None])[..., 0]
    return (labels >= 0) & (at_label == row_max.detach().view(labels.shape))


def chunk_weights(plan: Layout, temperature: float, denominator: Tensor | float | None) -> Tensor:
    """τ² · sample mask / D per chunk, [M]; D is at least 1."""
    denominator = plan.counted.sum() if denominator is None else torch.as_tensor(denominator, device=plan.weight.device)
    return plan.weight * temperature**2 / denominator.to(plan.weight.dtype).clamp_min(1)


def choose_columns(teacher_logits, projection, column_mask, vocab_topk, select) -> Tensor:
    """J: the columns that `select` finds in the flattened teacher logits, [k]."""
    keep = None if column_mask is None else column_mask.flatten()
    return select(teacher_logits.detach().flatten(0, 1)[:, : projection.n_teacher], keep, vocab_topk)


def op_arguments(student_logits, teacher_logits, projection, plan, columns, labels, options) -> tuple:
    """The arguments of the op, over flattened rows; options are temperature, divergence and tail."""
    student, teacher = student_logits.flatten(0, 1), teacher_logits.detach().flatten(0, 1)
    labels = None if labels is None else labels.flatten()
    sizes = projection.n_student, len(plan.weight)
    return student, teacher, *projection.columns, columns, plan.student, plan.teacher, labels, *sizes, *options


def stats(plan: Layout, kl: Tensor, agree: Tensor, chunks: Chunks, columns: Tensor) -> ProjectionKLStats:
    accuracy = agree.to(kl.dtype).sum() / plan.paired.sum().clamp_min(1)
    return ProjectionKLStats(accuracy, plan.counted.sum(), kl.detach().view(chunks.valid.shape), columns)


@without_autocast
def projection_kl(
    student: Tensor,  # [N_s, >= V_s]
    teacher: Tensor,  # [N_t, >= V_t]
    start: Tensor,  # [V_t + 1], with rows and weights the projection's column view
    rows: Tensor,
    weights: Tensor,
    columns: Tensor,  # [k] int64, J
    student_chunk: Tensor,  # [N_s] int64, -1: none
    teacher_chunk: Tensor,  # [N_t] int64
    labels: Tensor | None,  # [N_s] int64, -1: none
    width: int,  # V_s
    chunks: int,  # M
    temperature: float,
    divergence: int,  # place in DIVERGENCES
    tail: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """kl [M], 0 for a chunk without rows on either side; agree [M] bool: r and Q have the same largest column of J; and
    per student row nll, 0 without a label; max z, 0 for a row neither compared nor labelled; 1 / Σ exp((z - max) / τ), 0
    for a row not compared; 1 / Σ exp(z - max), 0 without a label. nll and the last are empty where labels is None."""
    z = student[:, :width].to(compute_dtype(student, teacher))
    p, row_max, row_scale = softmax(z, temperature)
    n_student, n_teacher = counts(student_chunk, chunks), counts(teacher_chunk, chunks)
    edges = slice_columns(start, rows, weights, columns)
    a = project(chunk_means(p, student_chunk, n_student), edges, len(columns))
    Q = chunk_means(log_teacher(teacher, len(start) - 1, columns, temperature, tail, z.dtype), teacher_chunk, n_teacher)
    paired = (n_student > 0) & (n_teacher > 0)
    r, k = shares(a, tail)[0], len(columns)
    agree = paired & (r[:, :k].argmax(1) == Q[:, :k].argmax(1)) if k else torch.zeros_like(paired)
    kl = compare(r, Q, divergence)[0].sum(1)
    compared = only(student_chunk, paired) >= 0
    nll, ce_scale = z.new_zeros(0), z.new_zeros(0)
    if labels is not None:
        labelled, ce_scale = labels >= 0, softmax(z, 1.0)[2]
        nll = -torch.log_softmax(z, 1).gather(1, labels.clamp_min(0)[:, None])[:, 0]
        nll, ce_scale = (torch.where(labelled, t, 0.0) for t in (nll, ce_scale))
    row_max = torch.where(compared if labels is None else compared | labelled, row_max, 0.0)
    return torch.where(paired, kl, 0.0), agree, nll, row_max, torch.where(compared, row_scale, 0.0), ce_scale


@without_autocast
def projection_kl_backward(
    grad: Tensor,  # [M]
    grad_nll: Tensor | None,  # [N_s]
    student: Tensor,
    teacher: Tensor,
    start: Tensor,
    rows: Tensor,
    weights: Tensor,
    columns: Tensor,
    student_chunk: Tensor,
    teacher_chunk: Tensor,
    labels: Tensor | None,
    width: int,
    chunks: int,
    temperature: float,
    divergence: int,
    tail: bool,
    row_max: Tensor,  # [N_s], with row_scale and ce_scale as projection_kl gave them
    row_scale: Tensor,
    ce_scale: Tensor,
) -> Tensor:
    """The gradient with respect to the student logits, in their dtype: the closed form above."""
    z = student[:, :width].to(compute_dtype(student, teacher))
    n_student, n_teacher = counts(student_chunk, chunks), counts(teacher_chunk, chunks)
    edges = slice_columns(start, rows, weights, columns)
    p = _softmax_known(z, row_max, row_scale, temperature)
    a = project(chunk_means(p, student_chunk, n_student), edges, len(columns))
    Q = chunk_means(log_teacher(teacher, len(start) - 1, columns, temperature, tail, z.dtype), teacher_chunk, n_teacher)
    r, total = shares(a, tail)
    g = compare(r, Q, divergence)[1]
    G = pull_back(g, r, total, tail) / (n_student.to(z.dtype) + COUNT_EPS)[:, None]
    paired = (n_student > 0) & (n_teacher > 0) & (grad != 0)
    G = torch.where(paired[:, None], G * grad.to(z.dtype)[:, None], 0.0)
    back = G.new_zeros(chunks, width)
    back.index_add_(1, edges.rows, G[:, edges.positions] * edges.weights.to(z.dtype))
    back = back.index_select(0, student_chunk.clamp_min(0)) if chunks else torch.zeros_like(z)
    part = torch.where((student_chunk >= 0)[:, None], p / temperature * (back - (p * back).sum(1, keepdim=True)), 0.0)
    if labels is not None and grad_nll is not None:
        grad_nll = torch.where(labels >= 0, grad_nll.to(z.dtype), 0.0)[:, None]
        p = _softmax_known(z, row_max, ce_scale, 1.0).scatter_add(
            1, labels.clamp_min(0)[:, None], -torch.ones_like(grad_nll)
        )
        part = part + torch.where(grad_nll != 0, p * grad_nll, 0.0)
    out = torch.zeros_like(student)
    out[:, :width] = part.to(out.dtype)
    return out


def shares(a: Tensor, tail: bool) -> tuple[Tensor, Tensor]:
    """r = a / (Σa + ε), with the tail's share where it is wanted, and the divisor [M, 1]."""
    if tail:
        a = torch.cat([a, (1 - a.sum(1, keepdim=True)).clamp_min(0)], 1)
    total = a.sum(1, keepdim=True) + EPS
    return a / total, total


def compare(r: Tensor, Q: Tensor, divergence: int) -> tuple[Tensor, Tensor]:
    """The terms of the divergence, and its derivative with respect to r; both [M, outcomes]."""
    u = r + EPS
    l = u.log()
    if DIVERGENCES[divergence] == "forward":
        return times(Q.exp(), Q - l), -Q.exp() / u
    if DIVERGENCES[divergence] == "reverse":
        return times(u, l - Q), 1 + l - Q
    q = Q.exp()
    v = q / (q.sum(1, keepdim=True) + EPS) + EPS
    m = (u + v) / 2
    slope = (u / m).log() / 2
    return u * slope + v * (v / m).log() / 2, slope


def pull_back(g: Tensor, r: Tensor, total: Tensor, tail: bool) -> Tensor:
    """dKL/da [M, k] from g = dKL/dr and what `shares` gave."""
    G = (g - (g * r).sum(1, keepdim=True)) / total
    return G[:, :-1] - torch.where(r[:, -1:] > 0, G[:, -1:], 0.0) if tail else G


def log_teacher(teacher: Tensor, size: int, columns: Tensor, temperature: float, tail: bool, dtype: torch.dtype) -> Tensor:
    """The teacher's log-probabilities of the outcomes, per row, [N_t, k] or with the tail [N_t, k + 1]."""
    if not tail:
        return torch.log_softmax(teacher[:, columns].to(dtype) / temperature, 1)
    log_q = torch.log_softmax(teacher[:, :size].to(dtype) / temperature, 1)
    rest = log_q.exp().index_fill(1, columns, 0.0).sum(1, keepdim=True)
    return torch.cat([log_q[:, columns], (rest + EPS).log()], 1)


def _softmax_known(z: Tensor, row_max: Tensor, scale: Tensor, temperature: float) -> Tensor:
    """softmax(z / τ) from each row's (max, 1 / sum); 0 in rows whose scale is 0."""
    row_max, scale = row_max[:, None].to(z.dtype), scale[:, None].to(z.dtype)
    return torch.where(scale == 0, 0.0, ((z - row_max) / temperature).exp() * scale)


def top_columns(teacher: Tensor, keep: Tensor | None, k: int) -> Tensor:
    """The k columns of teacher [N, V_t] with the largest logit in the rows `keep` [N] bool; ascending, [min(k, V_t)].

    Among equal maxima the lowest ids win; a column whose rows are all left out counts as -inf.
    """
    k = min(k, teacher.shape[1])
    if teacher.shape[0] == 0:
        return torch.arange(k, device=teacher.device)
    if keep is not None:
        teacher = torch.where(keep[:, None], teacher, -torch.inf)
    best = torch.sort(teacher.amax(0), descending=True, stable=True).indices[:k]
    return best.sort().values


def softmax(z: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(z / τ) of [N, V > 0], with max z and 1 / Σ exp((z - max) / τ) per row."""
    row_max = z.detach().amax(1)
    e = ((z - row_max[:, None]) / temperature).exp()
    scale = 1 / e.sum(1)
    return e * scale[:, None], row_max, scale.detach()


def project(p: Tensor, edges: Edges, k: int) -> Tensor:
    """p M[:, J]: from [M, V_s] to [M, k]."""
    return p.new_zeros(len(p), k).index_add(1, edges.positions, p[:, edges.rows] * edges.weights.to(p.dtype))


def weighted_sum(values: Tensor, weight: Tensor) -> Tensor:
    """Σ weight values, where a value of weight 0 may be anything."""
    return torch.where(weight != 0, weight * values, 0.0).sum()


def times(p: Tensor, x: Tensor) -> Tensor:
    """p x, and 0 where p is 0 even if x is infinite."""
    return torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, x))
