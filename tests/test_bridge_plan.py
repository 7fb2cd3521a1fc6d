"""Plans of many places at once against the definition, place by place."""

import numpy as np
import pytest
import torch
from bridge_problems import encodings, random_logits
from chassis.bridge import Bridge
from chassis.bridge.leaves import Leaves
from chassis.bridge.plan import Plan
from chassis.bridge.prefixes import Prefixes
from chassis.text.token_bytes import TokenBytes
from families import TEXTS, byte_level, sentencepiece_bpe, unigram
from hypothesis import given, settings
from hypothesis import strategies as st

TEXT = "the quick dog's\n\n    return x1234 日本 naïve 🙂  don't\n"


@pytest.fixture(scope="module")
def bridge():
    pair = TokenBytes.from_tokenizer(byte_level(500)), TokenBytes.from_tokenizer(sentencepiece_bpe())
    return Bridge.build(*pair, "counted", TEXTS * 10)


@pytest.mark.parametrize("make", [lambda: byte_level(500), sentencepiece_bpe, unigram])
def test_prefixes_are_those_of_the_tokens(make):
    leaves = Leaves(TokenBytes.from_tokenizer(make()))
    prefixes, tokens = leaves.prefixes, [leaves.strings[i] for i in leaves.order.tolist()]
    begun = sorted({token[:end] for token in tokens for end in range(len(token) + 1)}, key=lambda b: (len(b), b))
    assert len(begun) == len(prefixes.low) and [len(b) for b in begun] == prefixes.size.tolist()
    for node, data in enumerate(begun):
        assert np.array_equal(leaves.order[prefixes.low[node] : prefixes.high[node]], leaves.under_way(data)[0])
    node_of = {data: node for node, data in enumerate(begun)}
    for byte in range(256):
        children = prefixes.child(np.arange(len(begun)), np.full(len(begun), byte))
        assert children.tolist() == [node_of.get(data + bytes([byte]), -1) for data in begun]


def test_no_strings_have_no_prefixes():
    assert Prefixes([]).low.tolist() == [0]


@settings(max_examples=40, deadline=None)
@given(st.text("the quickbro\n dog's123日é", max_size=14))
def test_what_may_be_at_hand_is_what_the_definition_says(bridge, text):
    plan, expert = bridge.plan(text), bridge.expert
    pieces = [0, *(i for i in range(1, len(plan.data)) if plan.data[i] == 32 and plan.data[i - 1] not in b" \t\r\n")]
    for i, place in enumerate(plan.begins.tolist()):
        start = max([a for a in pieces if a < place], default=0)
        before = expert.ids_of([plan.data[a:b].decode() for a, b in zip(pieces, pieces[1:], strict=False) if b <= start])
        before = [token for ids in before for token in ids]
        ended, begun = set(), set()
        for e in range(start, place + 1):
            if e < len(plan.data) and plan.data[e] & 0xC0 == 0x80:
                continue
            so_far = plan.data[e:place]
            for path in encodings(expert, plan.data[start:e]):
                last = ([*before, *path] or [-1])[-1]
                blocked = set(bridge.under_way.mask.blocked_after(last).tolist()) if last >= 0 else set()
                longer = [t for t, data in enumerate(expert.bytes) if data.startswith(so_far) and len(data) > len(so_far)]
                if not so_far:
                    ended.add((*before, *path))
                elif set(longer) - blocked:
                    begun.add(((*before, *path), so_far))
                if so_far and plan.data[place] & 0xC0 == 0x80 and so_far in expert.ids_by_bytes:
                    ended.add((*before, *path, expert.ids_by_bytes[so_far][0]))
        assert {tuple(plan.tree.path(node)) for node in plan.complete[i]} == ended
        assert {(tuple(plan.tree.path(node)), so_far) for node, so_far in plan.under_way[i]} == begun
        assert len(plan.complete[i]) == len(ended) and len(plan.under_way[i]) == len(begun)


def test_texts_joined_give_what_each_gives(bridge):
    plans = [bridge.plan(text) for text in (TEXT, "", "dog", TEXT[5:30])]
    logits = [random_logits(plan, bridge.expert.width) for plan in plans]
    joined, apart = bridge.apply(Plan.join(plans), torch.cat(logits)), map(bridge.apply, plans, logits)
    for whole, parts in zip(joined, zip(*apart, strict=True), strict=True):
        assert torch.allclose(whole, torch.cat(parts), atol=1e-5)
