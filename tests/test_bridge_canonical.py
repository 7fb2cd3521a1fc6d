import time

import numpy as np
import pytest
import torch
from bridge_problems import encodings
from chassis.bridge import Bridge
from chassis.bridge.canonical import EMPTY, CanonicalMask
from chassis.bridge.leaves import Leaves
from chassis.bridge.merges import Merges
from chassis.bridge.pretokens import FOLLOWING, JOINED, SPLIT, Splits, _before
from chassis.bridge.under_way import UnderWay
from chassis.testbed.tokenizers import synthetic_bpe
from chassis.text.token_bytes import TokenBytes
from families import byte_level, metaspace_bpe, sentencepiece_bpe, unigram
from tokenizers import Regex, pre_tokenizers

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BPE = {
    "gpt2": byte_level,
    "llama3": lambda: byte_level(pattern=pre_tokenizers.Split(Regex(LLAMA3), "isolated"), ignore_merges=True),
    "no_split": lambda: byte_level(pattern=pre_tokenizers.Split(Regex("\n"), "isolated"), vocab_size=700),
    "sentencepiece": sentencepiece_bpe,
    "metaspace": metaspace_bpe,
}


@pytest.mark.parametrize("name", list(BPE))
def test_merge_ranks_block_what_encoding_every_pair_blocks(name):
    tokens = TokenBytes.from_tokenizer(BPE[name]())
    fast, oracle = CanonicalMask(tokens), CanonicalMask(tokens, by_merges=False)
    assert fast._merges is not None and oracle._merges is None
    for previous in np.flatnonzero(fast.alone).tolist():
        found, right = set(fast.blocked_after(previous).tolist()), set(oracle.blocked_after(previous).tolist())
        # After an apostrophe, or beginning with one, more may follow than encoding the pair by itself shows.
        wrong = found - right if len(_before(fast.texts[previous])) > 1 else found ^ right
        assert not [(tokens.bytes[previous], tokens.bytes[b], b in right) for b in wrong]


def test_unigram_is_asked_by_encoding():
    tokens = TokenBytes.from_tokenizer(unigram())
    mask = CanonicalMask(tokens)
    assert Merges.read(tokens) is None
    previous = tokens.encode(" quick").ids[-1]
    blocked = set(mask.blocked_after(int(previous)).tolist())
    for b in np.flatnonzero(mask.alone).tolist():
        found = tokens.ids_of([mask.texts[previous] + mask.texts[b] + after for after in FOLLOWING])
        assert any(ids[:2] == [previous, b] for ids in found) != (b in blocked)


@pytest.mark.parametrize("make", [byte_level, sentencepiece_bpe, unigram])
def test_no_encoding_holds_a_blocked_pair(make):
    tokens = TokenBytes.from_tokenizer(make())
    mask = CanonicalMask(tokens)
    text = "the quick dog's 12345 don't\n\n    return x + 1 日本 naïve 🙂\t tabs\r\nlines  café"
    ids = tokens.encode(text).ids.tolist()
    blocked = [(a, b) for a, b in zip(ids, ids[1:], strict=False) if b in mask.blocked_after(a)]
    assert [(tokens.bytes[a], tokens.bytes[b]) for a, b in blocked] == []


def test_bytes_of_a_character_follow_each_other():
    tokens = TokenBytes.from_tokenizer(sentencepiece_bpe())
    mask = CanonicalMask(tokens)
    lead, inner, letter = (tokens.ids_by_bytes[b][0] for b in (b"\xe2", b"\x80", b"a"))
    assert letter in mask.blocked_after(lead) and inner not in mask.blocked_after(lead)
    assert inner in mask.blocked_after(letter) and not len(mask.blocked_after(inner))


def test_lists_for_a_batch():
    tokens = TokenBytes.from_tokenizer(byte_level())
    mask = CanonicalMask(tokens)
    a, b = tokens.ids_by_bytes[b"a"][0], tokens.ids_by_bytes[b"t"][0]
    lists, places = mask.lists([a, -1, b, a])
    assert places.tolist() == [0, -1, 1, 0] and len(lists) == 2
    assert np.array_equal(lists.tokens[lists.start[1] :].numpy(), mask.blocked_after(b))
    nothing, places = mask.lists([-1])
    assert len(nothing) == 0 and places.tolist() == [-1]


def test_lists_are_the_same_whichever_of_them_are_kept(monkeypatch):
    tokens, rng = TokenBytes.from_tokenizer(byte_level()), np.random.default_rng(0)
    kept, dropped = CanonicalMask(tokens), CanonicalMask(tokens)
    for _ in range(3):
        previous = rng.integers(-1, tokens.width, 20)
        monkeypatch.setattr("chassis.bridge.canonical.LISTED", 16_000_000)
        lists, places = kept.lists(previous)
        monkeypatch.setattr("chassis.bridge.canonical.LISTED", 0)
        others, same = dropped.lists(previous)
        assert torch.equal(lists.start, others.start) and torch.equal(lists.tokens, others.tokens)
        assert torch.equal(places, same)
        for index, place in zip(previous.tolist(), places.tolist(), strict=True):
            own = lists.tokens[lists.start[place] : lists.start[place + 1]] if place >= 0 else EMPTY
            assert np.array_equal(own, kept.blocked_after(index) if index >= 0 else EMPTY)


def test_pretokenizer_states_tell_all_tokens_apart():
    """Every token tried behind `previous` gives what the tokens of its state and group gave."""
    tokens = TokenBytes.from_tokenizer(BPE["llama3"]())
    mask = CanonicalMask(tokens)
    pre = mask._pretokens
    known = np.flatnonzero(mask.whole)
    for previous in [tokens.ids_by_bytes[b][0] for b in (b"'", b" ", b"s", b"\n", b"1", b"a", b".")]:
        split, joined = pre.after(previous)
        found = pre._outcomes(mask.texts[previous], [mask.texts[index] for index in known])
        assert np.array_equal((found == SPLIT).any(0), split[known]) and np.array_equal(
            (found == JOINED).any(0), joined[known]
        )


@pytest.mark.parametrize("name", list(BPE))
def test_splits_found_for_all_tokens_are_those_found_one_by_one(name):
    tokens = TokenBytes.from_tokenizer(BPE[name]())
    one, all_at_once = CanonicalMask(tokens), CanonicalMask(tokens)
    packed = all_at_once.find_splits().pack()
    read = CanonicalMask(tokens, splits=Splits.unpack(packed))
    previous = range(tokens.width)
    for mask in (all_at_once, read):
        assert np.array_equal(mask.rows(previous), one.rows(previous))


def test_joins_are_those_of_taking_both_tokens_apart():
    """The definition, pair by pair: the piece of the highest rank is taken apart, until the two that meet join first."""
    merges = Merges.read(TokenBytes.from_tokenizer(BPE["no_split"]()))
    pair = {
        (x, int(merges._partner[i])): int(merges._pair_rank[i])
        for x in range(merges.n)
        for i in range(merges._partners[x], merges._partners[x + 1])
    }

    def join(x, y):
        limit = len(pair)
        while True:
            if pair.get((x, y), limit) < limit:
                return True
            if max(merges.rank[x], merges.rank[y]) < 0:
                return False
            if merges.rank[x] > merges.rank[y]:
                x, limit = merges.right[x], merges.rank[x]
            else:
                y, limit = merges.left[y], merges.rank[y] + 1

    compound = np.flatnonzero(merges.left >= 0)
    tried = np.concatenate([compound[::40], merges.left[compound][:5]])
    for previous, found in zip(tried.tolist(), merges.would_join(tried), strict=True):
        assert found.tolist() == [join(previous, b) for b in range(merges.n)]


@pytest.mark.slow
def test_large_vocabularies_take_seconds():
    expert, base = (TokenBytes.from_tokenizer(synthetic_bpe(n, seed)) for n, seed in ((40_000, 0), (50_000, 1)))
    started = time.process_time()
    bridge = Bridge.build(expert, base, "canonical")
    built = time.process_time()
    previous = np.random.default_rng(0).choice(np.flatnonzero(base.is_text), 200)
    lists, _ = bridge.mask.lists(previous.tolist())
    masked = time.process_time()
    assert bridge.coverage()["unmapped_tokens"] == 0 and len(lists) == len(set(previous.tolist()))
    assert built - started < 20 and masked - built < 10


@pytest.mark.parametrize("make", [*BPE.values(), unigram])
def test_beginnings_are_encoded_as_before_each_text_that_may_follow(make):
    tokens = TokenBytes.from_tokenizer(make())
    under_way = UnderWay(Leaves(tokens), CanonicalMask(tokens))
    text = (
        "f(x):\n        return\n\n\n\t  if x1  and   it's:" + 40 * " " + "dog\r\n" + 23 * " " + "the '12 日本🙂 naïve  quick"
    )
    beginnings = [text[:end].encode() for end in range(1, len(text) + 1)]
    for data, found in under_way.encodings(beginnings).items():
        assert set(map(tuple, found)) == encodings(tokens, data) and len(found) == len(set(map(tuple, found)))
