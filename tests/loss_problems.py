"""One face for all losses: what has a gradient, what has none, the op and its eager definition."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from chassis_kernels import (
    Chunks,
    Delta,
    SparseProjection,
    gold_kl,
    linear_kl,
    linear_projection_kl,
    projection_kl,
    token_kl,
)
from chassis_kernels.reference import gold_kl as gold_definition
from chassis_kernels.reference import linear_projection_kl as linear_definition
from chassis_kernels.reference import projection_kl as projection_definition
from chassis_kernels.reference import token_kl as token_definition

EPS = torch.finfo(torch.float32).eps


class Case(NamedTuple):
    leaves: tuple[torch.Tensor, ...]  # logits; hidden states, W and bias; or the factors of a Delta
    teacher: tuple[torch.Tensor, ...]  # floats without a gradient
    where: Chunks | torch.Tensor | None  # which positions count: chunks, or a mask
    op: Callable  # (leaves, teacher, where, **options) -> loss []
    definition: Callable  # the same under autograd
    eager: Callable  # what one writes without the op, where that is not the definition: logits in the inputs' dtype

    def to(self, dtype):
        return self._replace(
            leaves=tuple(t.to(dtype) for t in self.leaves), teacher=tuple(t.to(dtype) for t in self.teacher)
        )


def make(name, b=2, t=9, v=37, c=5, seed=0, scale=3.0, shared=False, single=False, ordered=False) -> Case:
    """A problem for `name`: b samples of t positions (linear_kl: b t rows) and v student tokens, in float32.

    shared: both sides have the same tokens, of which the even ones map to themselves alone. Chunks, c a sample: at random;
    single: one student position each; ordered: about as many positions in each, side by side.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    if name == "linear_kl":
        rows, d, r = b * t, 16, 3
        heads = normal(rows, d) * scale, normal(v, d) / 4, normal(rows, d) * scale, normal(v, d) / 4
        return Case(
            (normal(rows, r) / 2, normal(r, v), normal(v) / 10), heads, None, _linear_kl, *[_linear_kl_definition] * 2
        )
    if name == "token_kl":
        mask = torch.rand(b, t, generator=g) * (torch.rand(b, t, generator=g) < 0.7)
        return Case((scale * normal(b, t, v),), (scale * normal(b, t, v + 3),), mask, _token_kl, *[_token_definition] * 2)
    v_t, t_t = (v, t) if shared else (29, t + 2)
    teacher = (scale * normal(b, t_t, v_t),)
    projection = _projection(v, v_t, g, shared)
    ids = [torch.randint(-1, c, (b, n), generator=g) for n in (t, t_t)]
    if single:
        ids[0] = torch.arange(-1, t - 1).where(torch.arange(t) <= c, -1).repeat(b, 1)
    if ordered:
        ids = [(torch.arange(-1, n - 1) * c).div(n - 1, rounding_mode="floor").repeat(b, 1) for n in (t, t_t)]
    chunks = Chunks(*ids, torch.ones(b, c, dtype=torch.bool) if single or ordered else torch.rand(b, c, generator=g) < 0.8)
    if name == "linear_projection_kl":
        head = scale * normal(b, t, 6), normal(v, 6) / 6**0.5, normal(v)
        functions = _linear_projection_kl, _linear_projection_definition, _linear_projection_eager
        return Case(head, teacher, chunks, *_with(projection, functions))
    op, definition = {
        "projection_kl": (projection_kl, projection_definition.loss),
        "gold_kl": (gold_kl, gold_definition.loss),
    }[name]
    return Case(
        (scale * normal(b, t, v),), teacher, chunks, *_with(projection, map(_of_logits, (op, definition, definition)))
    )


def run(function, case, upstream=None, **options):
    """The loss by case.op or case.definition, and the gradients of upstream(loss), by default the loss, for the leaves."""
    leaves = [t.detach().requires_grad_() for t in case.leaves]
    loss = function(leaves, case.teacher, case.where, **options)
    return loss.detach(), torch.autograd.grad(loss if upstream is None else upstream(loss), leaves)


def check(case, **options):
    """At most twice the error of the eager expression in the input dtype."""
    loss, grads = run(case.op, case, **options)
    right_loss, right = run(case.definition, case.to(torch.float64), **options)
    eager_loss, eager = run(case.eager, case, **options)
    assert loss.dtype == torch.float32
    assert abs(loss - right_loss) <= 2 * abs(eager_loss - right_loss) + 8 * EPS * (1 + abs(right_loss))
    for leaf, found, plain, want in zip(case.leaves, grads, eager, right, strict=True):
        assert found.dtype == leaf.dtype and found.shape == leaf.shape
        assert (found - want).norm() <= 2 * (plain - want).norm() + 8 * EPS * want.norm()
    return loss, grads


def _projection(v, v_t, g, shared) -> SparseProjection:
    ids = torch.randint(0, v_t, (v, 2), generator=g)
    exact = torch.rand(v, generator=g) < 0.5
    if shared:
        ids = torch.stack([torch.arange(v), (torch.arange(v) + 1) % v], 1)
        exact = torch.arange(v) % 2 == 0
    first = 0.5 + 0.5 * torch.rand(v, generator=g)
    weights = torch.stack([first.where(~exact, 1.0), (1 - first).where(~exact, 0.0)], 1)
    ids[exact, 1] = -1
    return SparseProjection(ids, weights, v_t)


def _with(projection, functions):
    return [lambda *tensors, f=f, **options: f(*tensors, projection, **options) for f in functions]


def _of_logits(loss):
    return lambda leaves, teacher, chunks, projection, **options: loss(*leaves, *teacher, projection, chunks, **options)[0]


def _linear_projection_kl(leaves, teacher, chunks, projection, **options):
    hidden, weight, bias = leaves
    return linear_projection_kl(hidden, weight, *teacher, projection, chunks, student_bias=bias, **options)[0]


def _linear_projection_definition(leaves, teacher, chunks, projection, **options):
    hidden, weight, bias = leaves
    return linear_definition.loss(hidden, weight, *teacher, projection, chunks, student_bias=bias, **options)[0]


def _linear_projection_eager(leaves, teacher, chunks, projection, **options):
    hidden, weight, bias = leaves
    return projection_definition.loss(hidden @ weight.T + bias, *teacher, projection, chunks, **options)[0]


def _token_kl(leaves, teacher, mask, n_tokens=3.0, **options):
    return token_kl(*leaves, *teacher, mask, n_tokens=n_tokens, **options)


def _token_definition(leaves, teacher, mask, n_tokens=3.0, **options):
    return token_definition.loss(*leaves, *teacher, mask, n_tokens=n_tokens, **options)


def _linear_kl(leaves, heads, _, **options):
    return linear_kl(*heads, delta=Delta(*leaves), **options).mean()


def _linear_kl_definition(leaves, heads, _):
    (h_a, W_a, h_b, W_b), (u, v, c) = heads, leaves
    a = h_a @ W_a.T + u @ v + c
    return F.kl_div(a.log_softmax(1), (h_b @ W_b.T).log_softmax(1), log_target=True, reduction="none").sum(1).mean()
