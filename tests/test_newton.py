"""The Gauss-Newton statistics against the same expressions written out over all rows in float64."""

import dataclasses

import pytest
import torch
from chassis.closed_form import Change, closed_form
from chassis.errors import ChassisError
from chassis.experts import Readout
from chassis.newton import DAMPING, SHARES, STEPS, ProbabilityStatistics, newton_closed_form, probabilities
from chassis.probes import Rows
from chassis.refine import mean_kl


def batches(base, n=3, rows=160, seed=0, strength=1.0):
    """Rows whose expert is the base with a linear change of its hidden state."""
    generator = torch.Generator().manual_seed(seed)
    change = torch.randn(6, 6, generator=torch.Generator().manual_seed(9)) * 0.4 * strength
    found = []
    for _ in range(n):
        hidden = torch.randn(rows, 6, generator=generator) + 0.5
        log_q = probabilities(hidden + hidden @ change, base)[0].log()
        found.append(Rows(hidden, log_q, {}, torch.zeros(rows, dtype=torch.long), rows, torch.zeros(rows, dtype=torch.long)))
    return found


def readout(softcap=None, scale=1.0, bias=True):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(20, 6, generator=generator) * 0.5
    return Readout(weight, torch.randn(20, generator=generator) * 0.1 if bias else None, softcap, scale)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"scale": 0.5}, {"bias": False}], ids=str)
def test_targets_are_the_damped_newton_step(options):
    base = readout(**options)
    statistics = ProbabilityStatistics(base, Readout(None), 4)
    parts = batches(base)
    for rows in parts:
        statistics.update(rows)
    hidden = torch.cat([r.final for r in parts]).double().requires_grad_()
    q = torch.cat([r.expert for r in parts]).double().exp()
    weight = base.weight.double()
    logits = base.scale * (hidden @ weight.T + (0 if base.bias is None else base.bias.double()))
    logits = logits if base.softcap is None else base.softcap * torch.tanh(logits / base.softcap)
    (g,) = torch.autograd.grad((q * logits.log_softmax(1)).sum(), hidden)  # minus the gradient of the KL
    p = logits.softmax(1).detach()
    middle = 0.5 * (p.mean(0) + q.mean(0))
    fisher = base.scale**2 * (weight.T * middle) @ weight - base.scale**2 * torch.outer(weight.T @ middle, weight.T @ middle)
    fisher = fisher + DAMPING * fisher.diagonal().mean() * torch.eye(6)
    y = hidden.detach() + 0.3 * g @ fisher.inverse()
    x = hidden.detach()
    found = statistics.newton(0.3).final
    torch.testing.assert_close(found.mean_y, y.mean(0), rtol=1e-5, atol=1e-6)
    expected = (x - x.mean(0)).T @ (y - y.mean(0))
    torch.testing.assert_close(found.C, expected, rtol=1e-4, atol=1e-3)


def test_the_step_that_leaves_least_on_validation_is_taken():
    base, expert = readout(), Readout(None)
    statistics = ProbabilityStatistics(base, expert, 4)
    for rows in batches(base):
        statistics.update(rows)
    held = batches(base, n=1, seed=5)
    before = mean_kl(None, base, expert, held)
    best = mean_kl(newton_closed_form(statistics, 1e-6, 3, held).adapter(3), base, expert, held)
    each = [mean_kl(closed_form(statistics.newton(s), 1e-6).adapter(3), base, expert, held) for s in STEPS]
    assert best == pytest.approx(min(each), rel=1e-5) and best < 0.6 * before


def true_change(base):
    """The change that `batches` makes."""
    change = torch.randn(6, 6, generator=torch.Generator().manual_seed(9)).double() * 0.4
    return Change(change, (base.weight,), 0.5 * change.sum(0) @ base.weight.double().T)


def test_changes_add_up_as_matrices():
    base = readout()
    one, other = true_change(base), Change(torch.eye(6).double(), (base.weight.flip(0),), torch.ones(20).double())
    both = one * 0.5 + other
    whole = both.factor @ torch.cat(both.joint, 1).double().T
    expected = 0.5 * one.factor @ base.weight.double().T + base.weight.flip(0).double().T
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(both.bias, 0.5 * one.bias + 1)


def test_another_change_is_added_as_far_as_validation_likes_it():
    base, expert = readout(), Readout(None)
    statistics = ProbabilityStatistics(base, expert, 4)
    for rows in batches(base):
        statistics.update(rows)
    held, right = batches(base, n=1, seed=5), true_change(base)

    def start(semantic, init):
        found = newton_closed_form(statistics, 1e-6, 3, held, semantic, init=init)
        return mean_kl(found.adapter(3), base, expert, held), tuple(found.weights.values())

    step, alone = start(right, "newton"), start(right, "semantic")
    assert step[1][1] == 0 and alone[1] == (0, 1)
    assert alone[0] < step[0]
    assert start(right, "both")[0] < step[0] and start(right, "both")[1][1] == SHARES[0]
    wrong = right * -1
    assert start(wrong, "both") == start(None, "both") == step


def test_no_finite_kl_is_said_and_not_papered_over():
    base = readout()
    statistics = ProbabilityStatistics(base, Readout(None), 4)
    (rows,) = batches(base, n=1)
    statistics.update(rows)
    broken = dataclasses.replace(rows, expert=torch.full_like(rows.expert, torch.nan))
    with pytest.raises(ChassisError, match="finite for none of the steps 1.0, .* check that"):
        newton_closed_form(statistics, 1e-6, 3, [broken])


def test_probabilities_with_zeros_are_fine():
    base = readout()
    (rows,) = batches(base, n=1)
    blocked = torch.where(torch.arange(20) < 5, -torch.inf, rows.expert)
    statistics = ProbabilityStatistics(base, Readout(None), 4)
    statistics.update(Rows(rows.final, blocked.log_softmax(1), {}, rows.next_ids, rows.n_bytes, rows.window))
    assert statistics.newton(1.0).final.C.isfinite().all()


def test_a_saved_state_goes_on_bit_for_bit():
    base = readout()
    parts = batches(base)
    whole, first = (ProbabilityStatistics(base, Readout(None), 4) for _ in range(2))
    for rows in parts:
        whole.update(rows)
    first.update(parts[0])
    second = ProbabilityStatistics(base, Readout(None), 4)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    for rows in parts[1:]:
        second.update(rows)
    a, b = whole.state_dict(), second.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
