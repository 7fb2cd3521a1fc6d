"""The closed form equals what it stands for: ridge on [N, V] logits at full rank, exact recovery of affine experts."""

import pytest
import torch
from chassis.closed_form import closed_form, fisher
from chassis.errors import ChassisError
from chassis.experts import CallableExpert, LogitBiasExpert, LowRankExpert, token_ids
from chassis.probes import Probe, make_windows
from chassis.refine import delta_of, mean_kl
from chassis.statistics import Statistics
from support import documents, pair


@pytest.fixture(scope="module")
def setting(tiny_lm, tiny_tokenizer):
    base, expert = pair(tiny_lm, tiny_tokenizer)
    return base, expert, make_windows(documents(30), tiny_tokenizer, length=48)


def statistics_of(base, expert, windows):
    statistics, batches = Statistics(base.readout, expert.readout), list(Probe(base.model, expert).batches(windows))
    for rows in batches:
        statistics.update(rows)
    return statistics, batches


def test_full_rank_equals_ridge_on_logits(setting):
    base, expert, windows = setting
    statistics, batches = statistics_of(base, expert, windows)
    hidden = torch.cat([rows.final for rows in batches]).double()
    wb, we = base.readout.weight.double(), expert.readout.weight.double()
    change = torch.cat([rows.expert for rows in batches]).double() @ we.T - hidden @ wb.T
    alpha = 1e-6
    centred = hidden - hidden.mean(0)
    gram = centred.T @ centred
    penalty = alpha * gram.trace() / len(gram) * torch.eye(len(gram), dtype=torch.float64)
    # Ridge is linear in its target, and shrinks both parts of it: the expert's logits and the base's.
    explicit = torch.linalg.solve(gram + penalty, centred.T @ (change - change.mean(0)))
    wanted = centred @ explicit + change.mean(0)
    u, v, c = delta_of(closed_form(statistics, alpha).adapter(32), hidden)
    error = ((u.double() @ v.double() + c) - wanted).norm() / wanted.norm()
    assert error < 1e-4


def test_more_rank_never_explains_less_and_spectrum_sums_to_it(setting):
    base, expert, windows = setting
    statistics, batches = statistics_of(base, expert, windows)
    closed = closed_form(statistics)
    assert torch.all(closed.spectrum[:-1] >= closed.spectrum[1:])
    kls = [mean_kl(closed.adapter(rank), base.readout, expert.readout, batches) for rank in (2, 8, 32)]
    assert mean_kl(None, base.readout, expert.readout, batches) > kls[0] > kls[1] > kls[2]


def test_truncating_the_full_adapter_is_fitting_the_smaller_rank(setting):
    base, expert, windows = setting
    closed = closed_form(statistics_of(base, expert, windows)[0])
    cut, direct = closed.adapter(32).truncate(5), closed.adapter(5)
    assert torch.equal(cut.U, direct.U)
    torch.testing.assert_close(cut.V, direct.V)  # a product of 5 rows rounds otherwise than one of 32


def test_fisher_is_the_softmax_metric():
    """Against the definition with R = I: diag(p) - p p^T."""
    p = torch.rand(5000, dtype=torch.float64).softmax(0)
    small = torch.randn(5000, 3, dtype=torch.float64)
    wanted = small.T @ (torch.diag(p) - torch.outer(p, p)) @ small
    torch.testing.assert_close(fisher((small[:, :1], small[:, 1:]), p), wanted)


def test_column_restricted_adapter_touches_only_its_columns_and_grows_better(setting):
    base, expert, windows = setting
    statistics, batches = statistics_of(base, expert, windows)
    closed, size = closed_form(statistics), base.head.vocab_size
    kls = []
    for columns in (20, 100, size):
        adapter = closed.adapter(8, columns)
        v, c = adapter.full_columns()
        assert (v.abs().sum(0) + c.abs() > 0).sum() <= columns
        kls.append(mean_kl(adapter, base.readout, expert.readout, batches))
    assert kls[0] > kls[1] > kls[2]


def test_low_rank_expert_is_recovered_exactly(setting):
    base, _, windows = setting
    expert = LowRankExpert.random(base.head, rank=4, std=0.2)
    statistics, batches = statistics_of(base, expert, windows)
    no_op = mean_kl(None, base.readout, expert.readout, batches)
    kl = mean_kl(closed_form(statistics, 1e-9).adapter(4), base.readout, expert.readout, batches)
    assert no_op > 1e-2 and kl < 1e-4 * no_op  # the target is affine of rank 4: only rounding is left


def test_logit_bias_expert_is_recovered_by_the_bias_alone(setting, tiny_tokenizer):
    base, _, windows = setting
    expert = LogitBiasExpert.from_strings(base.head, tiny_tokenizer, {"the": 4.0, "x": 2.0})
    statistics, batches = statistics_of(base, expert, windows)
    assert mean_kl(None, base.readout, expert.readout, batches) > 0.01
    assert mean_kl(closed_form(statistics, 1e-9).adapter(1), base.readout, expert.readout, batches) < 1e-6


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere"])
def test_callable_expert_equals_the_model_it_wraps(tiny_lm, tiny_tokenizer, architecture):
    """Ridge shrinks the wrapped expert's logits only, of the direct one the base's too: 1e-6 of tr(S)/D moves little."""
    base, expert = pair(tiny_lm, tiny_tokenizer, architecture)
    windows = make_windows(documents(30), tiny_tokenizer, length=48)

    def logits(ids, mask):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        return expert.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits

    wrapped = CallableExpert(logits, base.head.vocab_size)
    direct, batches = statistics_of(base, expert, windows)
    tiled, same = statistics_of(base, wrapped, windows)
    a, b = closed_form(direct, 1e-6).adapter(8), closed_form(tiled, 1e-6).adapter(8)
    rows = batches[0].final
    da, db = (d.u @ d.v + d.c for d in (delta_of(a, rows), delta_of(b, rows)))
    assert (da - db).norm() < 1e-2 * da.norm()
    kls = [mean_kl(a, base.readout, e.readout, rows) for e, rows in ((expert, batches), (wrapped, same))]
    assert kls[0] == pytest.approx(kls[1], rel=1e-3)


def test_logit_bias_strings_must_be_single_tokens(setting, tiny_tokenizer):
    base, _, _ = setting
    assert all(tiny_tokenizer.decode([i]).strip() == "the" for i in token_ids(tiny_tokenizer, "the"))
    with pytest.raises(ChassisError, match="not one token"):
        token_ids(tiny_tokenizer, "jumps zebra")
    with pytest.raises(ChassisError, match="finite"):
        LogitBiasExpert.from_strings(base.head, tiny_tokenizer, {"the": float("nan")})


def test_different_softcaps_are_refused(setting):
    base, expert, windows = setting
    statistics, _ = statistics_of(base, expert, windows)
    statistics.expert = statistics.expert._replace(softcap=30.0)
    with pytest.raises(ChassisError, match="caps its logits at None and the expert at 30"):
        closed_form(statistics)


@pytest.mark.parametrize("architecture", ["gemma2", "cohere", "granite"])
def test_capped_and_scaled_heads_are_fitted_in_their_own_units(tiny_lm, tiny_tokenizer, architecture):
    """An affine expert is recovered exactly only if scale and cap are where the model has them."""
    base, _ = pair(tiny_lm, tiny_tokenizer, architecture)
    expert = LowRankExpert.random(base.head, rank=3, std=0.2)
    statistics, batches = statistics_of(base, expert, make_windows(documents(30), tiny_tokenizer, length=48))
    no_op = mean_kl(None, base.readout, expert.readout, batches)
    kl = mean_kl(closed_form(statistics, 1e-9).adapter(3), base.readout, expert.readout, batches)
    assert no_op > 1e-3 and kl < 1e-3 * no_op


def test_an_expert_of_another_scale_is_fitted_in_the_units_of_the_base(setting):
    base, _, windows = setting
    expert = LowRankExpert.random(base.head, rank=3, std=0.2)
    expert.readout = expert.readout._replace(weight=base.readout.weight / 0.25, scale=0.25)
    statistics, batches = statistics_of(base, expert, windows)
    no_op = mean_kl(None, base.readout, expert.readout, batches)
    assert mean_kl(closed_form(statistics, 1e-9).adapter(32), base.readout, expert.readout, batches) < 1e-3 * no_op


def test_rank_and_columns_out_of_range(setting):
    base, expert, windows = setting
    closed = closed_form(statistics_of(base, expert, windows)[0])
    with pytest.raises(ChassisError, match="rank 33.*32 being the width"):
        closed.adapter(33)
    with pytest.raises(ChassisError, match="301 columns|columns: expected"):
        closed.adapter(2, base.head.vocab_size + 1)
