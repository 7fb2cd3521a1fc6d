"""Problems for linear_projection_kl and the numerical contract that every backend is held to on them."""

import sys
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from chassis_kernels import Chunks, SparseProjection, TeacherHead, TopK, linear_projection_kl, projection_kl
from chassis_kernels.reference import linear_projection_kl as reference
from chassis_kernels.reference import teacher as teacher_logits

module = sys.modules["chassis_kernels.linear_projection_kl"]  # the package's name of that spelling is the function
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("logits", "head", "top-k")


class Problem(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    teacher: torch.Tensor | TeacherHead | TopK
    projection: SparseProjection
    chunks: Chunks
    options: dict

    def to(self, dtype):
        tensors = (t if t is None else t.to(dtype) for t in self[:3])
        teacher = self.teacher
        if isinstance(teacher, TopK):
            teacher = teacher._replace(log_probs=teacher.log_probs.to(dtype))
        elif isinstance(teacher, TeacherHead):
            teacher = TeacherHead(*(t.to(dtype) for t in teacher[:3]), teacher.softcap)
        else:
            teacher = teacher.to(dtype)
        return Problem(*tensors, teacher, *self[4:])


def problem(
    b=2, t_s=9, t_t=11, v_s=37, v_t=29, d=6, k=3, c=5, topk=12, seed=0, form="logits", bias=True, single=False, **options
):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    projection = SparseProjection(torch.randint(-1, v_t, (v_s, k), generator=g), torch.rand(v_s, k, generator=g), v_t)
    ids_s, ids_t = (torch.randint(-1, c, (b, t), generator=g) for t in (t_s, t_t))
    if single:
        ids_s = torch.arange(t_s).repeat(b, 1) - 1
        ids_s = torch.where(ids_s < c, ids_s, -1)
    chunks = Chunks(ids_s, ids_t, torch.rand(b, c, generator=g) < 0.8, torch.rand(b, c, generator=g) < 0.7)
    teacher = 3 * normal(b, t_t, v_t)
    if form == "head":
        teacher = TeacherHead(normal(b, t_t, 5), normal(v_t, 5), normal(v_t), 9.0)
    elif form == "top-k":
        log_probs, ids = torch.log_softmax(teacher, -1).topk(min(7, v_t), -1)
        teacher = TopK(log_probs, torch.where(torch.rand(ids.shape, generator=g) < 0.1, -1, ids))
    head = 3 * normal(b, t_s, d), normal(v_s, d) / max(d, 1) ** 0.5, normal(v_s) if bias else None
    return Problem(*head, teacher, projection, chunks, {"vocab_topk": topk, **options})


def run(p, upstream=None, needs=(True, True, True), **more):
    """Loss, stats and the gradients (of upstream(loss), by default the loss) by the op."""
    leaves = [t if t is None else t.detach().requires_grad_(need) for t, need in zip(p[:3], needs, strict=True)]
    loss, stats = linear_projection_kl(*leaves[:2], *p[3:6], student_bias=leaves[2], **p.options | more)
    if loss.requires_grad:
        (loss if upstream is None else upstream(loss)).backward()
    return loss.detach(), stats, [None if t is None else t.grad for t in leaves]


def truth(p, dtype=torch.float64, columns=None):
    """The same by autograd through the eager definition."""
    p = p.to(dtype)
    leaves = [t if t is None else t.detach().requires_grad_() for t in p[:3]]
    options = {name: value for name, value in p.options.items() if name != "restrict"}
    if columns is not None:
        options["columns"] = columns
    loss, stats = reference.loss(*leaves[:2], *p[3:6], student_bias=leaves[2], **options)
    wanted = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else [None] * len(wanted)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)]
    return loss.detach(), stats, grads


def eager(p, columns):
    """What one writes without this op: logits in the inputs' dtype, then the loss in float32."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in p[:3]]
    z = leaves[0] @ leaves[1].T
    if leaves[2] is not None:
        z = z + leaves[2]
    cap = p.options.get("student_softcap")
    if cap is not None:
        z = cap * torch.tanh(z / cap)
    options = {n: v for n, v in p.options.items() if n not in ("student_softcap", "restrict")} | {"columns": columns}
    loss, _ = projection_kl(z, teacher_logits.logits(p.teacher, p.projection.n_teacher), *p[4:6], **options)
    wanted = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(loss, wanted) if loss.requires_grad else [torch.zeros_like(t) for t in wanted]
    return loss.detach(), grads


def check(p, **more):
    """The numerical contract: at most twice the error of the eager expression in the input dtype."""
    loss, stats, grads = run(p, **more)
    right_loss, right_stats, right = truth(p, columns=stats.columns)
    eager_loss, eager_grads = eager(p, stats.columns)
    assert loss.dtype == torch.float32
    assert abs(loss - right_loss) <= 2 * abs(eager_loss - right_loss) + 4e-6 * (1 + abs(right_loss))
    for found, other, want in zip((g for g in grads if g is not None), eager_grads, right, strict=True):
        unit = want.norm() + 1e-30
        assert found.dtype == other.dtype and found.shape == want.shape
        assert (found.double() - want).norm() / unit <= 2 * (other.double() - want).norm() / unit + 2e-6
    assert stats.valid_pairs == right_stats.valid_pairs
    torch.testing.assert_close(stats.chunk_kl.double(), right_stats.chunk_kl, rtol=1e-4, atol=5e-5)
    return loss, stats, grads


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "part of a wider one": lambda t: torch.cat([t, t + 1], -1)[..., : t.shape[-1]],
    "every other row": lambda t: t.repeat_interleave(2, -2)[..., ::2, :],
}


DRAWN = st.fixed_dictionaries(
    {
        "b": st.integers(1, 3),
        "t": st.tuples(st.integers(1, 12), st.integers(1, 12)),
        "v": st.tuples(st.integers(1, 150), st.integers(1, 150)),
        "d": st.one_of(st.integers(0, 40), st.sampled_from([129, 257, 300])),
        "k": st.integers(0, 4),
        "c": st.integers(1, 6),
        "topk": st.integers(1, 160),
        "dtype": st.sampled_from(DTYPES),
        "layouts": st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 2),
        "form": st.sampled_from(FORMS),
        "bias": st.booleans(),
        "student_softcap": st.sampled_from([None, 4.0]),
        "temperature": st.sampled_from([1.0, 2.0, 0.5]),
        "divergence": st.sampled_from(["forward", "reverse", "js"]),
        "tail": st.booleans(),
        "exact_only": st.booleans(),
        "block": st.sampled_from([1, 5, 96]),
        "seed": st.integers(0, 99),
    }
)


def check_drawn(b, t, v, d, k, c, topk, dtype, layouts, form, bias, block, seed, **options):
    p = problem(b, *t, *v, d, k, c, topk, seed, form, bias, **options).to(dtype)
    p = p._replace(hidden=LAYOUTS[layouts[0]](p.hidden), weight=LAYOUTS[layouts[1]](p.weight))
    before, module.BLOCK_ROWS = module.BLOCK_ROWS, (block, block)
    try:
        check(p)
    finally:
        module.BLOCK_ROWS = before
