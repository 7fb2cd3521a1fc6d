"""linear_projection_kl where every chunk is one student token: only the rows of the head that project are needed."""

import pytest
import torch
from linear_projection_problems import DTYPES, FORMS, check, problem, run
from support import each_backend_of

backend = each_backend_of("linear_projection_kl")


def single(**options):
    """A third of the student's tokens project into the columns."""
    p = problem(t_s=12, v_s=60, v_t=90, k=1, c=11, topk=30, single=True, **options)
    return p


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_chunks_of_one_token_need_only_the_rows_that_project(dtype, form, backend):
    p = single(form=form, student_softcap=9.0).to(dtype)
    loss, stats, grads = check(p)
    assert 0 < stats.touched <= 0.6
    whole = run(p, restrict=False)
    assert whole[1].touched == 1
    torch.testing.assert_close(loss, whole[0], rtol=1e-5, atol=1e-6)
    untouched = torch.ones(60, dtype=torch.bool)
    untouched[p.projection.slice(stats.columns).rows] = False
    assert untouched.float().mean() == pytest.approx(1 - stats.touched)
    assert not grads[1][untouched].any() and not grads[2][untouched].any()


def test_restriction_differs_by_epsilon():
    """The share rho of the mass on the tokens kept divides ε: a student that gives J a mass of 1e-6 sees it in float64."""
    p = single(bias=True).to(torch.float64)
    kept = p.projection.slice(run(p)[1].columns).rows.unique()
    bias = p.bias.clone()
    bias[kept] -= 20
    p = p._replace(bias=bias)
    loss, whole = (run(p, restrict=restrict)[0] for restrict in (True, False))
    z = p.hidden @ p.weight.T + p.bias
    mass = z.softmax(-1)[..., kept].sum(-1)
    assert mass.max() < 1e-4
    assert 0 < abs(loss - whole) < 1e-10 / mass.min() / p.projection.weights.min()


def test_restriction_is_refused_where_it_would_be_wrong():
    for p in (problem(), single(tail=True), single(labels=torch.zeros(2, 12, dtype=torch.int64))):
        assert run(p)[1].touched == 1
        with pytest.raises(ValueError, match="needs chunks of one student token"):
            run(p, restrict=True)
