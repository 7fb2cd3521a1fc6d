"""The main job on the testbed: the figures this project promises for real (small) models and real held-out source code."""

import pytest
from chassis.experts import load_expert
from chassis.fit import Base, FitOptions, fit
from chassis.models import load_causal_lm
from chassis.results import measure, summarise


@pytest.fixture(scope="module")
def measured(testbed):
    base = Base(*load_causal_lm(testbed.base), name="base")
    expert = load_expert(str(testbed.expert), base.head, base.tokenizer)
    options = FitOptions(rank=32, ranks=(8, base.head.width), max_windows=1000, max_test_windows=256)
    result = fit(base, expert, testbed.documents["source"], options)
    return base, result, summarise(base, expert, result, measure(base, expert, result), prompts=["def "])


@pytest.mark.parametrize(
    ("kind", "rank", "share"),
    [("closed form", 8, 0.24), ("closed form", 32, 0.38), ("refined", 8, 0.44), ("refined", 32, 0.58)],
)
def test_share_of_the_no_op_kl_removed_on_held_out_source(measured, kind, rank, share):
    row = next(row for row in measured[2]["ranks"] if (row["kind"], row["rank"]) == (kind, rank))
    assert row["share_removed"] >= share


def test_rank_32_gives_nine_tenths_of_a_refined_full_rank_adapter(measured):
    base, _, report = measured
    shares = {row["rank"]: row["share_removed"] for row in report["ranks"] if row["kind"] == "refined"}
    assert shares[32] >= 0.9 * shares[base.head.width]


def test_more_than_half_of_the_gap_in_bits_per_byte_is_closed(measured):
    bits = measured[2]["bits_per_byte"]
    assert bits["expert"] < bits["adapted"] < bits["base"] and bits["gap_closed"] >= 0.54


def test_later_layers_see_the_expert_better(measured):
    kls = [row["kl"] for row in measured[2]["layers"]]
    assert kls[0] > kls[-2] and kls[-1] < measured[2]["no_op"]["kl"]


def test_text_before_and_after_differs(measured):
    row = measured[2]["generations"][0]
    assert row["base"] != row["adapted"] and row["adapted"].strip()
