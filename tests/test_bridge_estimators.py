"""Estimators that ask more than the text: maximum likelihood (the expert), Jeffrey's rule (the base)."""

import itertools
import math

import numpy as np
import pytest
import torch
from bridge_problems import bpe, random_logits
from chassis.bridge import Bridge, likeliest
from chassis.bridge.apply import States
from chassis.bridge.em import Evidence, Support, maximise
from chassis.bridge.jeffrey import METHODS
from chassis.bridge.row_probabilities import row_probabilities
from chassis.errors import BridgeError
from chassis.text.token_bytes import TokenBytes
from families import TEXTS, byte_level, sentencepiece_bpe

TOY = "abbaabababbbaaab" * 2


@pytest.fixture(scope="module")
def pair():
    return TokenBytes.from_tokenizer(byte_level(500)), TokenBytes.from_tokenizer(sentencepiece_bpe())


@pytest.fixture(scope="module")
def counted(pair):
    return Bridge.build(*pair, "counted", TEXTS * 10)


def states(bridge, text, seed=0):
    plan = bridge.plan(text)
    return States(plan, random_logits(plan, bridge.expert.width, seed), bridge.under_way, bridge.padding)


def evidence_of(bridge, texts):
    evidence = Evidence(Support(bridge.leaves, bridge.base), len(bridge.leaves))
    for text in texts:
        evidence.add(states(bridge, text))
    return evidence


def test_row_probabilities_are_a_distribution_in_any_tiles(counted):
    known = states(counted, "the quick brown fox")
    n_rows = len(counted.leaves)
    (whole,) = [P for _, P in row_probabilities(known, n_rows)]
    tiles = list(row_probabilities(known, n_rows, cells=8_000_000 // 2))
    assert len(tiles) > 2 and torch.equal(torch.cat([P for _, P in tiles]), whole)
    assert torch.allclose(whole.sum(1), torch.ones(len(whole)), atol=1e-5)
    q = (whole @ counted.table.dense()).log()
    assert torch.allclose(q, counted.apply(known.plan, known.logits, masked=False).log_q, atol=1e-4)


def test_support_is_what_fits_byte_by_byte(counted):
    support, strings = Support(counted.leaves, counted.base), counted.leaves.strings
    for token in np.flatnonzero(counted.base.is_text)[::23].tolist():
        data = counted.base.bytes[token]
        want = [row for row, s in enumerate(strings) if s and (s.startswith(data) or data.startswith(s))]
        assert sorted(support.rows_of(token).tolist()) == want


def test_the_likeliest_table_of_a_toy_language_equals_brute_force():
    """Expert a, b, ab; base a, b, ba: the rows "b" and, within "ab", its residual "b" are open between b and ba."""
    bridge = Bridge.build(bpe("ab", ("a", "b")), bpe("ab", ("b", "a")), "canonical")
    known = states(bridge, TOY)
    table, history = maximise(evidence_of(bridge, [TOY]), bridge.table, prior=0.0, iterations=3000)
    M, (P,) = table.dense().double(), [P.double() for _, P in row_probabilities(known, len(bridge.leaves))]
    assert torch.allclose(M[: len(bridge.leaves)].sum(1), torch.ones(len(bridge.leaves)).double(), atol=1e-6)
    ids = torch.from_numpy(known.plan.base_ids)[:, None]

    def likelihood(token: float, residual: float) -> float:
        tried = bridge.table.dense().double()
        for row, share in ((bridge.expert.ids_by_bytes[b"b"][0], token), (bridge.leaves.strings.index(b"b", 3), residual)):
            tried[row] = torch.tensor([0.0, 1 - share, share])
        return float((P @ tried).gather(1, ids).log().mean())

    best = max(likelihood(x, y) for x, y in itertools.product(torch.linspace(0, 1, 101).tolist(), repeat=2))
    found = float((P @ M).gather(1, ids).log().mean())
    assert found == pytest.approx(history[-1], abs=1e-6)
    assert best - 1e-6 <= found <= best + 1e-3  # the grid's step is 0.01 and the optimum is flat


@pytest.mark.parametrize("prior", [0.0, 1.0, 100.0])
def test_no_update_lowers_the_likelihood(counted, prior):
    evidence = evidence_of(counted, TEXTS[:6])
    table, history = maximise(evidence, counted.table, prior=prior)
    assert len(history) > 3 and min(np.diff(history)) >= -1e-12 and history[-1] > history[0]
    assert torch.allclose(table.row_sum, torch.ones(len(counted.leaves)), atol=1e-5)
    n = sum(len(counted.plan(text)) for text in TEXTS[:6])
    assert 0.98 * n <= evidence.n_positions <= n  # places that the made-up expert holds all but impossible are left out


def test_a_strong_prior_keeps_the_counts_and_batches_add_up(counted):
    evidence = evidence_of(counted, TEXTS[:4])
    kept, _ = maximise(evidence, counted.table, prior=1e9)
    assert torch.allclose(kept.dense(), counted.table.dense(), atol=1e-4)
    backwards = evidence_of(counted, TEXTS[3::-1])
    one, other = (maximise(e, counted.table)[0].dense() for e in (evidence, backwards))
    assert torch.allclose(one, other, atol=1e-6)


def test_the_likeliest_bridge_is_a_bridge(counted, pair, tmp_path):
    bridge = likeliest(counted, TEXTS, lambda plan: random_logits(plan, counted.expert.width), window=32, positions=200)
    assert bridge.method == "em" and bridge.complete
    loaded = Bridge.load(bridge.save(tmp_path / "em.safetensors"), *pair)
    plan = counted.plan("the dog")
    logits = random_logits(plan, counted.expert.width)
    result = loaded.apply(plan, logits)
    assert torch.equal(result.log_q, bridge.apply(plan, logits).log_q)
    assert torch.allclose(result.log_q.exp().sum(1), torch.ones(len(plan)), atol=1e-6)
    same = Bridge.build(pair[0], pair[0], "canonical")
    for message, call in {
        "no place of the text": lambda: likeliest(counted, [], lambda plan: None),
        "tokenizers are the same": lambda: likeliest(same, TEXTS, lambda plan: None),
        "needs the expert's model": lambda: Bridge.build(*pair, "em", TEXTS),
    }.items():
        with pytest.raises(BridgeError, match=message):
            pytest.fail(f"accepted: {message}, {call()}")


def base_says(n, width, seed=1):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).mul(3).log_softmax(1)


@pytest.mark.parametrize("method", METHODS)
def test_jeffrey_is_two_products_with_w(counted, pair, method):
    bridge = Bridge.build(*pair, method, TEXTS * 10)
    known = states(bridge, "the quick brown fox")
    n = len(known.plan)
    log_p = base_says(n, bridge.base.width)
    if method == "jeffrey":
        W = torch.zeros(len(bridge.leaves), bridge.base.width, dtype=torch.float64)
        first = Bridge.build(*pair, "canonical").table
        W[first.rows, first.ids.long()] = 1
        for row, data in enumerate(bridge.leaves.strings):
            for text, ids in bridge.base.ids_by_bytes.items():
                if data and text.startswith(data):
                    W[row, ids[0]] = 1
    else:
        W = counted.table.dense().double() / counted.unigram
    (P,) = [P.double() for _, P in row_probabilities(known, len(bridge.leaves))]
    p = log_p.double().exp()
    q = p * ((P / (p @ W.T).clamp_min(1e-300)) @ W)
    result = bridge.apply(known.plan, known.logits, base_log_probs=log_p, masked=False)
    assert torch.allclose(result.log_q.double().exp(), q / q.sum(1, keepdim=True), atol=1e-6)
    assert torch.allclose(result.log_q.exp().sum(1), torch.ones(n), atol=1e-6)
    assert torch.allclose(result.mass, torch.ones(n), atol=1e-5)
    masked = bridge.apply(known.plan, known.logits, base_log_probs=log_p)
    assert torch.allclose(masked.log_q.exp().sum(1), torch.ones(n), atol=1e-6)
    for i in range(1, n):
        blocked = torch.from_numpy(bridge.mask.blocked_after(int(known.plan.base_ids[i - 1]))).long()
        assert (masked.log_q[i, blocked] == -math.inf).all()


def test_jeffrey_leaves_closed_tokens_and_specials_where_they_were(pair):
    """Where the bytes leave no choice the base is not asked: the end of the text, and tokens no base token goes beyond."""
    bridge = Bridge.build(*pair, "jeffrey")
    expert, base = pair
    logits = torch.full((1, expert.width), -40.0)
    logits[0, expert.roles["eos"]] = 0.0
    result = bridge.project(logits, base_log_probs=base_says(1, base.width))
    assert result.log_q[0, base.roles["eos"]] == pytest.approx(0, abs=1e-5)
    toy = Bridge.build(bpe("ab", ("a", "b")), bpe("ab", ("b", "a")), "jeffrey")
    P, says = torch.tensor([[0.2, 0.5, 0.3]]), torch.tensor([[0.6, 0.1, 0.3]])
    found = toy.project(P.log(), base_log_probs=says.log())
    assert torch.allclose(found.log_q.exp(), torch.tensor([[0.5, 0.125, 0.375]]), atol=1e-6)
    assert found.uncertainty.item() == pytest.approx(0.5 * 0.25, abs=1e-6)


def test_jeffrey_takes_a_top_k(pair):
    bridge = Bridge.build(*pair, "jeffrey")
    logits, says = base_says(3, pair[0].width, seed=2), base_says(3, pair[1].width)
    top = logits.topk(7)
    found = bridge.project(log_probs=top.values, ids=top.indices, base_log_probs=says)
    assert torch.allclose(found.mass, top.values.exp().sum(1), atol=1e-5)
    assert torch.allclose(found.log_q.exp().sum(1), found.mass, atol=1e-5)
    assert (found.uncertainty >= 1 - found.mass - 1e-5).all()


def test_jeffrey_between_a_tokenizer_and_itself_is_bit_exact(pair):
    bridge = Bridge.build(pair[0], pair[0], "jeffrey")
    plan = bridge.plan("the quick brown fox")
    logits = random_logits(plan, pair[0].width)
    assert torch.equal(bridge.apply(plan, logits).log_q, torch.log_softmax(logits[: len(plan)], 1))


def test_jeffrey_asks_for_the_base(pair, counted, tmp_path):
    bridge = Bridge.load(Bridge.build(*pair, "jeffrey").save(tmp_path / "j.safetensors"), *pair)
    plan = bridge.plan("the dog")
    logits = random_logits(plan, bridge.expert.width)
    for given, message in ((None, "are missing"), (torch.zeros(2, 3), r"are \[2, 3\]")):
        with pytest.raises(BridgeError, match=message):
            bridge.apply(plan, logits, base_log_probs=given)
        with pytest.raises(BridgeError, match=message):
            bridge.project(logits, base_log_probs=given)
    with pytest.raises(BridgeError, match="only a counted bridge"):
        bridge.asking_base()
    with pytest.raises(BridgeError, match="needs texts"):
        Bridge.build(*pair, "jeffrey_counted")
