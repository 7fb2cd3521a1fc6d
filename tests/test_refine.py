"""Refinement lowers the KL, never returns something worse, and keeps the columns it was given."""

import pytest
import torch
from chassis.closed_form import closed_form
from chassis.errors import ChassisError
from chassis.probes import Probe, make_windows
from chassis.refine import mean_kl, refine
from chassis.statistics import Statistics
from support import documents, pair


@pytest.fixture(scope="module")
def setting(tiny_lm, tiny_tokenizer):
    base, expert = pair(tiny_lm, tiny_tokenizer)
    probe = Probe(base.model, expert)
    batches = list(probe.batches(make_windows(documents(40), tiny_tokenizer, length=48)))
    held = list(probe.batches(make_windows(documents(8, seed=5), tiny_tokenizer, length=48)))
    statistics = Statistics(base.readout, expert.readout)
    for rows in batches:
        statistics.update(rows)
    return base, expert, closed_form(statistics), batches, held


def refine_one(closed, rank, batches, held, **options):
    return refine(closed, [rank], batches, held, **options)[rank]


def forever(batches):
    while True:
        yield from batches


def test_refinement_beats_the_closed_form_on_held_out_rows(setting):
    base, expert, closed, batches, held = setting
    found = refine_one(closed, 8, forever(batches), held, steps=40)
    assert found.kept and found.adapter.config.refined
    assert found.validation_kl < found.closed_form_validation_kl < found.no_op_validation_kl
    assert mean_kl(found.adapter, base.readout, expert.readout, held) == pytest.approx(found.validation_kl, rel=1e-4)
    assert [entry["step"] for entry in found.steps] == list(range(1, 41))


def test_a_search_that_only_harms_returns_the_closed_form(setting):
    _, _, closed, batches, held = setting
    found = refine_one(closed, 8, forever(batches), held, steps=10, rate=3.0, check_every=1)
    start = closed.adapter(8)
    assert not found.kept and found.validation_kl == found.closed_form_validation_kl
    assert torch.equal(found.adapter.U, start.U) and torch.equal(found.adapter.V, start.V)
    assert all(entry["validation_kl"] > found.validation_kl for entry in found.steps)


def test_refinement_keeps_to_the_chosen_columns(setting):
    base, _, closed, batches, held = setting
    found = refine_one(closed, 4, forever(batches), held, steps=10, columns=50)
    assert found.adapter.cols.tolist() == closed.adapter(4, 50).cols.tolist()
    assert found.validation_kl <= found.closed_form_validation_kl


def test_refinement_is_deterministic(setting):
    _, _, closed, batches, held = setting
    a, b = (refine_one(closed, 4, forever(batches), held, steps=5).adapter for _ in range(2))
    assert torch.equal(a.U, b.U) and torch.equal(a.V, b.V) and torch.equal(a.bias, b.bias)


def test_refined_directions_are_in_order_of_what_they_explain(setting):
    base, expert, closed, batches, held = setting
    adapter = refine_one(closed, 8, forever(batches), held, steps=20).adapter
    kls = [mean_kl(adapter.truncate(r) if r else None, base.readout, expert.readout, held) for r in (0, 2, 4, 8)]
    assert kls == sorted(kls, reverse=True)


def test_ranks_refined_side_by_side_equal_each_alone(setting):
    _, _, closed, batches, held = setting
    together = refine(closed, [2, 5], forever(batches), held, steps=5)
    for rank in (2, 5):
        assert torch.equal(together[rank].adapter.V, refine_one(closed, rank, forever(batches), held, steps=5).adapter.V)


def test_bad_settings_are_named(setting):
    _, _, closed, batches, held = setting
    with pytest.raises(ChassisError, match="0 steps"):
        refine_one(closed, 4, batches, held, steps=0)
    with pytest.raises(ChassisError, match="no validation rows"):
        refine_one(closed, 4, batches, [], steps=1)
