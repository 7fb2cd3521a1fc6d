"""The heat map of token lengths and the sample rows that `chassis bridge build` shows."""

import numpy as np
import pytest
from bridge_problems import bpe
from chassis.bridge import Bridge
from chassis.bridge.coverage import LONGEST, bridge_links, heat_map, projection_links, sample_rows, shares_by_length, shown
from chassis.bridge.projection import build_projection
from chassis.text.token_bytes import TokenBytes
from families import byte_level, sentencepiece_bpe


@pytest.fixture(scope="module")
def pair():
    return TokenBytes.from_tokenizer(byte_level(500)), TokenBytes.from_tokenizer(sentencepiece_bpe())


@pytest.mark.parametrize("method", ["exact", "canonical", "projection"])
def test_every_length_gives_its_tokens_away_once(pair, method):
    expert, base = pair
    if method == "projection":
        links = projection_links(build_projection(base, expert), base, expert)
    else:
        links = bridge_links(Bridge.build(expert, base, method).table, expert, base)
    shares = shares_by_length(links)
    rows = links.sides[0]
    present = np.isin(np.arange(1, LONGEST + 1), np.minimum(rows.lengths[rows.is_text], LONGEST))
    assert np.allclose(shares.sum(1), present) and (shares[:, 0] > 0.1).any() == (method != "canonical")
    if method == "exact":
        assert not shares[:, 1:][~np.eye(LONGEST, dtype=bool)].any()
    assert heat_map(links).startswith(b"\x89PNG") and len(sample_rows(links)) >= 10


def test_bytes_that_are_no_text_are_spelt(pair):
    tokens = pair[0]
    of = {data: tokens.ids_by_bytes[data][0] for data in (b"\xc2", b"\n", b" the")}
    assert [shown(tokens, index) for index in of.values()] == ["<0xC2>", r"'\n'", "' the'"]


def test_shares_of_a_toy():
    """a and b stay, ab (2 bytes) becomes a (1 byte)."""
    expert, base = bpe("ab", ("a", "b")), bpe("ab", ("b", "a"))
    links = bridge_links(Bridge.build(expert, base, "canonical").table, expert, base)
    shares = shares_by_length(links)
    assert shares[0, 1] == 1 and shares[1, 1] == 1 and shares.sum() == 2
    assert sample_rows(links) == [["'a'", "'a' 1.000"], ["'b'", "'b' 1.000"], ["'ab'", "'a' 1.000"]]
