"""String matching as it is usually done, which the ladder measures beside matching by bytes."""

import pytest
import torch
from bridge_problems import random_logits
from chassis.bridge import Bridge
from chassis.bridge.decoded import METHODS, decoded_bridge
from chassis.text.token_bytes import TokenBytes
from families import byte_level, sentencepiece_bpe


@pytest.fixture(scope="module")
def pair():
    tokenizers = byte_level(500), sentencepiece_bpe()
    return tuple(map(TokenBytes.from_tokenizer, tokenizers)), tokenizers


def test_decoded_strings_lose_spaces_and_parts_of_characters(pair):
    (expert, base), tokenizers = pair
    table = decoded_bridge("exact", expert, base, tokenizers).table.dense()
    by_bytes = Bridge.build(expert, base, "exact").table.dense()
    the, spaced = expert.ids_by_bytes[b"the"][0], expert.ids_by_bytes[b" the"][0]
    assert by_bytes[spaced, base.ids_by_bytes[b" the"][0]] == 1
    assert not table[spaced].any()  # " the" is the string "the" for the base
    assert table[the, base.ids_by_bytes[b" the"][0]] == 1 or table[the, base.ids_by_bytes[b"the"][0]] == 1
    parts = [expert.ids_by_bytes[bytes([byte])][0] for byte in range(0x80, 0xC0)]
    assert len(table[parts].nonzero()[:, 1].unique()) == 1  # one U+FFFD for all
    assert not table[expert.width :].any() and not table[expert.roles["eos"]].any()
    assert (table.sum(1) > 0).sum() < (by_bytes.sum(1) > 0).sum()


def test_two_segments_halve_what_has_no_equal(pair):
    (expert, base), tokenizers = pair
    one, two = (decoded_bridge(method, expert, base, tokenizers).table.dense() for method in METHODS)
    added = ((one.sum(1) == 0) & (two.sum(1) > 0)).nonzero()[:, 0]
    assert len(added) and torch.equal(one[one.sum(1) > 0], two[one.sum(1) > 0])
    for row in added.tolist():
        ids = tokenizers[1].encode(tokenizers[0].decode([row]), add_special_tokens=False)
        want = torch.zeros(base.width).index_add(0, torch.tensor(ids), torch.full((2,), 0.5))
        assert torch.equal(two[row], want)


def test_what_found_no_counterpart_is_scaled_away(pair):
    (expert, base), tokenizers = pair
    bridge = decoded_bridge("exact", expert, base, tokenizers)
    plan = bridge.plan("the dog")
    result = bridge.apply(plan, random_logits(plan, expert.width), masked=False)
    mapped = result.mass > 0
    assert (result.mass < 0.9).all() and torch.allclose(result.log_q.exp().sum(1)[mapped], torch.ones(int(mapped.sum())))
