"""Problems for projection_kl and the numerical contract that every backend is held to on them."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from support import HALF

from chassis_kernels.chunks import Chunks
from chassis_kernels.projection_kl import projection_kl
from chassis_kernels.reference import projection_kl as reference
from chassis_kernels.sparse import SparseProjection

DIVERGENCES = reference.DIVERGENCES


class Problem(NamedTuple):
    student: torch.Tensor
    teacher: torch.Tensor
    projection: SparseProjection
    chunks: Chunks
    options: dict

    def to(self, dtype):
        return self._replace(student=self.student.to(dtype), teacher=self.teacher.to(dtype))


def problem(b=2, t_s=9, t_t=11, v_s=37, v_t=29, k=3, c=5, topk=12, seed=0, scale=3.0, labelled=False, **options):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, v_t, (v_s, k), generator=g)
    projection = SparseProjection(ids, torch.rand(v_s, k, generator=g), v_t)
    chunks = Chunks(
        torch.randint(-1, c, (b, t_s), generator=g),
        torch.randint(-1, c, (b, t_t), generator=g),
        torch.rand(b, c, generator=g) < 0.8,
        torch.rand(b, c, generator=g) < 0.7,
    )
    student = scale * torch.randn(b, t_s, v_s, generator=g)
    teacher = scale * torch.randn(b, t_t, v_t, generator=g)
    if labelled:  # some labels count for nothing, some rows have none
        options["labels"] = torch.randint(-1, v_s, (b, t_s), generator=g)
        options["label_weight"] = torch.randn(b, t_s, generator=g) * (torch.rand(b, t_s, generator=g) < 0.7)
    return Problem(student, teacher, projection, chunks, {"vocab_topk": topk, **options})


def run(p, upstream=None, **more):
    """Loss, stats and gradient (of upstream(loss), by default the loss) by the op."""
    student = p.student.detach().requires_grad_()
    loss, stats = projection_kl(student, p.teacher, p.projection, p.chunks, **p.options, **more)
    (loss if upstream is None else upstream(loss)).backward()
    return loss.detach(), stats, student.grad


def truth(p, dtype=torch.float64, columns=None):
    """The same by autograd through the eager definition, in float64 unless told."""
    student = p.student.detach().to(dtype).requires_grad_()
    options = p.options | ({} if columns is None else {"columns": columns})
    loss, stats = reference.loss(student, p.teacher.to(dtype), p.projection, p.chunks, **options)
    grad = torch.autograd.grad(loss, student)[0] if loss.requires_grad else torch.zeros_like(student)
    return loss.detach(), stats, grad


def check(p, **more):
    """The numerical contract: at most twice the error of the eager expression in the input dtype."""
    loss, stats, grad = run(p, **more)
    right_loss, right_stats, right = truth(p, columns=stats.columns)
    eager_loss, _, eager = truth(p, torch.float32, columns=stats.columns)
    assert torch.equal(stats.columns, truth(p)[1].columns)
    assert grad.dtype == p.student.dtype and loss.dtype == torch.float32
    eager_error = (eager.to(p.student.dtype).double() - right).norm()
    assert (grad.double() - right).norm() <= 2 * eager_error + 4e-7 * right.norm() + 1e-7  # of terms of size 1 that cancel
    assert abs(loss - right_loss) <= 2 * abs(eager_loss - right_loss) + 2e-6 * (1 + abs(right_loss))
    assert stats.valid_pairs == right_stats.valid_pairs
    torch.testing.assert_close(stats.chunk_kl.double(), right_stats.chunk_kl, rtol=2e-5, atol=1e-5)
    return loss, stats, grad


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "part of a wider head": lambda t: torch.cat([t, t + 1], 2)[..., : t.shape[2]],
    "every other row": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda t: t[:1].expand_as(t),
}


DRAWN = st.fixed_dictionaries(
    {
        "b": st.integers(1, 3),
        "t": st.tuples(st.integers(1, 12), st.integers(1, 12)),
        "v": st.tuples(st.integers(1, 150), st.integers(1, 150)),
        "k": st.integers(0, 4),
        "c": st.integers(1, 6),
        "topk": st.integers(1, 160),
        "dtypes": st.tuples(*[st.sampled_from([torch.float32, *HALF])] * 2),
        "layouts": st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 2),
        "seed": st.integers(0, 99),
        "labelled": st.booleans(),
        "temperature": st.sampled_from([1.0, 2.0, 0.5]),
        "divergence": st.sampled_from(DIVERGENCES),
        "tail": st.booleans(),
        "exact_only": st.booleans(),
    }
)


def check_drawn(b, t, v, k, c, topk, dtypes, layouts, seed, **options):
    p = problem(b, *t, *v, k, c, topk, seed, **options)
    student = LAYOUTS[layouts[0]](p.student.to(dtypes[0]))
    check(p._replace(student=student, teacher=LAYOUTS[layouts[1]](p.teacher.to(dtypes[1]))))
