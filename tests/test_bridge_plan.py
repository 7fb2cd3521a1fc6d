"""Plans of many places at once against the definition, place by place."""

from unittest import mock

import numpy as np
import pytest
import torch
from bridge_problems import encodings, random_logits
from chassis.bridge import Bridge
from chassis.bridge.canonical import CanonicalMask
from chassis.bridge.leaves import Leaves
from chassis.bridge.plan import Plan, make_plans
from chassis.bridge.prefixes import Prefixes
from chassis.bridge.tree import Tree
from chassis.bridge.under_way import UnderWay
from chassis.errors import BridgeError
from chassis.text.token_bytes import TokenBytes
from families import TEXTS, byte_level, sentencepiece_bpe, unigram
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

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


PATTERNS = {
    "gpt-2": None,
    "llama-3": r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "digits from the right": r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))| ?[^\s\p{N}]+|\s+(?!\S)|\s+",
    "case": r"[^\r\n\p{L}\p{N}]?(?:\p{Lu}*\p{Ll}+|\p{Lu}+)|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+(?!\S)|\s+",
    "two characters ahead": r"[a-m]+(?=[a-m][n-z])| ?[a-m]?[n-z]+| ?[a-m]+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+|\p{L}+",
}


@pytest.fixture(scope="module", params=PATTERNS)
def pair(request):
    pattern = PATTERNS[request.param]
    split = {} if pattern is None else {"pattern": pre_tokenizers.Split(Regex(pattern), "isolated")}
    tokens = TokenBytes.from_tokenizer(byte_level(600, **split))
    return tokens, TokenBytes.from_tokenizer(sentencepiece_bpe()), (Leaves(tokens), CanonicalMask(tokens))


@settings(max_examples=60, deadline=None)
@example("heicks, quicks")
@example("the quick12345678901 x1234567\n\n\n     \n   return")
@given(st.text("thequick returnXY.(\"'sd)\n\t\r 1234é日  ", max_size=60))
def test_encodings_are_taken_up_where_they_would_be_the_same_from_the_start(pair, text):
    tokens, base, known = pair
    (found,) = make_plans(tokens, base, UnderWay(*known), [text])
    with mock.patch("chassis.bridge.plan.resumed", lambda ends, own, pieces, *_: pieces[own]):
        (whole,) = make_plans(tokens, base, UnderWay(*known), [text])
    for one, other in zip(_states(found), _states(whole), strict=True):
        assert one == other


def _states(plan):
    path = plan.tree.path
    yield from ({tuple(path(node)) for node in nodes} for nodes in plan.complete)
    yield from ({(tuple(path(node)), so_far) for node, so_far in nodes} for nodes in plan.under_way)


def test_plans_without_what_is_blocked_give_the_same_from_fewer_states(bridge):
    text = "def quickly(self):\n        returning = x + 1\n\n\n    class Foxes(object):\n"
    (plan,), (short,) = bridge.plans([text]), bridge.plans([text], followed=True)
    logits, row = random_logits(plan, bridge.expert.width), {}
    for node in range(len(plan.tree)):
        row[tuple(plan.tree.path(node))] = node
    own = logits[[row[tuple(short.tree.path(node))] for node in range(len(short.tree))]]
    assert len(short.tree) < len(plan.tree) and len(short.begun) < len(plan.begun)
    assert torch.allclose(bridge.apply(plan, logits).log_q.exp(), bridge.apply(short, own).log_q.exp(), atol=1e-6)
    with pytest.raises(BridgeError, match="masked=False"):
        bridge.apply(short, own, masked=False)


def test_a_table_that_does_not_map_every_token_leaves_nothing_out(bridge):
    exact = Bridge.build(bridge.expert, bridge.base, "exact")
    (plan,), (same,) = exact.plans([TEXT]), exact.plans([TEXT], followed=True)
    assert same.options is None and len(same.tree) == len(plan.tree)


def test_sums_along_the_paths_of_a_forest():
    rng, n = np.random.default_rng(0), 300
    parent = np.array([-1 if i % 100 == 0 else rng.integers(max(i - 4, i // 100 * 100), i) for i in range(n)])
    values, expected = rng.standard_normal(n), np.zeros(n)
    values[[7, 150]] = -np.inf
    for node in range(n):
        expected[node] = expected[parent[node]] + values[node] if parent[node] >= 0 else 0.0
    found = Tree(np.zeros(n, dtype=np.int64), parent, np.zeros(n, dtype=np.int64), 0).path_sums(values)
    assert np.allclose(found, expected, rtol=0, atol=1e-12) and np.isinf(found).sum() > 2
