"""The expert's states of several texts, read at once, and what becomes of q when branches are left out."""

import copy
from unittest import mock

import pytest
import torch
from chassis.bridge import Bridge, tree_logits
from chassis.bridge.forest import Reader
from chassis.models import capture
from chassis.text.token_bytes import TokenBytes
from families import TEXTS, sentencepiece_bpe


@pytest.fixture(scope="module")
def expert(tiny_tokenizer):
    return TokenBytes.from_tokenizer(tiny_tokenizer)


@pytest.fixture(scope="module")
def bridge(expert):
    return Bridge.build(expert, TokenBytes.from_tokenizer(sentencepiece_bpe()), "counted", TEXTS * 10)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("share", [0.0, 1e-30])
def test_several_texts_at_once_equal_each_alone(tiny_lm, expert, bridge, architecture, share):
    model = tiny_lm(architecture)
    plans = [bridge.plan(text) for text in ("the quick foxes jump", "the", "dog's", "quick foxes jump over\n   the 日")]
    each = torch.cat([bridge.apply(plan, tree_logits(model, plan.tree, 0)).log_q for plan in plans])
    read = Reader(model, 0, bridge).read(plans, share)
    assert len(read.plan.tree) == len(read.logits) == sum(len(plan.tree) for plan in plans)
    together = bridge.apply(read.plan, read.logits, log_sums=read.log_sums)
    assert torch.allclose(together.log_q.exp(), each.exp(), atol=1e-6)


def test_what_is_left_out_counts_for_less_than_its_share(tiny_lm, expert, bridge):
    model, plans = tiny_lm("llama"), bridge.plans(TEXTS[:8], followed=True)
    whole = Reader(model, 0, bridge).read(plans)
    q, n_nodes = bridge.apply(whole.plan, whole.logits).log_q.exp(), len(whole.logits)
    for share in (0.03, 0.1):
        read = Reader(model, 0, bridge).read(plans, share)
        assert sum(plan.tree.n_trunk + 1 for plan in plans) < len(read.logits) < n_nodes
        found = bridge.apply(read.plan, read.logits).log_q.exp()
        assert torch.allclose(found.sum(1), torch.ones(len(q)), atol=1e-6)
        assert (found - q).abs().sum(1).mean() < share
        n_nodes = len(read.logits)


def test_models_that_do_not_pack_are_read_a_text_at_a_time(tiny_lm, expert, bridge):
    model, plans = copy.deepcopy(tiny_lm("llama")), [bridge.plan(text) for text in ("the quick foxes", "dog's")]
    packed = Reader(model, 0, bridge).read(plans)
    model.config._attn_implementation = "eager"
    reader = Reader(model, 0, bridge)
    found = reader.read(plans, 0.5)
    assert not reader.packs and len(found.logits) == len(packed.logits)
    q, other = (bridge.apply(read.plan, read.logits, log_sums=read.log_sums).log_q.exp() for read in (found, packed))
    assert torch.allclose(q, other, atol=1e-6)
    own = [torch.tensor([[0, *plan.expert_ids]]) for plan in plans]
    alone = torch.cat([capture(model, ids).final[0] for ids in own])
    assert all(torch.allclose(read.trunks, alone, atol=1e-4) for read in (found, packed))


def test_sums_are_right_where_the_first_logit_is_minus_infinity(tiny_lm, expert, bridge):
    reader, plans = Reader(tiny_lm("llama"), 0, bridge), [bridge.plan("the quick foxes")]
    head = type(reader.head)
    logits_ = head.logits_
    with mock.patch.object(head, "logits_", lambda *a: logits_(*a).index_fill_(1, torch.tensor([0]), -torch.inf)):
        read = reader.read(plans)
    assert torch.allclose(read.log_sums, read.logits.logsumexp(1))
