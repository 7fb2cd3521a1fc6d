import json
import unicodedata

import numpy as np
import pytest
from chassis.errors import TokenizerError
from chassis.text.samples import SAMPLES
from chassis.text.token_bytes import TokenBytes
from families import FAMILIES, add, byte_level, sentencepiece_bpe, unigram, wordpiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


@pytest.fixture(scope="module")
def made():
    """Every family once: name -> (tokenizer, TokenBytes)."""
    tokenizers = {name: make() for name, make in FAMILIES.items()}
    return {name: (tokenizer, TokenBytes.from_tokenizer(tokenizer)) for name, tokenizer in tokenizers.items()}


@pytest.fixture(params=list(FAMILIES))
def family(request, made):
    return made[request.param]


def spelled(tokens, encoded):
    return b"".join(tokens.bytes[i] for i in encoded.ids)


def test_bytes_of_the_tokens_are_the_bytes_of_the_text(family):
    _, tokens = family
    for text, encoded in zip(SAMPLES, tokens.encode_batch(SAMPLES), strict=True):
        assert spelled(tokens, encoded) == encoded.data == tokens.normalize(text).encode()


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30))
def test_any_text_is_spelled_by_its_tokens(made, text):
    for name, (_, tokens) in made.items():
        encoded = tokens.encode(text)
        normal = unicodedata.normalize("NFC", text) if name in ("byte_level_nfc", "unigram") else text
        # <0xHH> as text is found by a Unigram model itself, as a byte token.
        assert spelled(tokens, encoded) == normal.encode() or (name == "unigram" and "<0x" in text)


def test_ends_are_the_running_sum_of_bytes(family):
    _, tokens = family
    encoded = tokens.encode("naïve 日本 🙂 x")
    pieces = [encoded.data[a:b] for a, b in zip([0, *encoded.ends], encoded.ends, strict=False)]
    assert pieces == [tokens.bytes[i] for i in encoded.ids] and encoded.ends[-1] == len(encoded.data)
    assert len(tokens.encode("")) == 0


def test_special_strings_in_a_text_stay_text(family):
    tokenizer, tokens = family
    for special in tokenizer.all_special_tokens:
        encoded = tokens.encode(f"a{special} b")
        assert tokens.is_text[encoded.ids].all() and spelled(tokens, encoded) == f"a{special} b".encode()


def test_roles(family):
    tokenizer, tokens = family
    assert tokens.roles["eos"] == tokenizer.eos_token_id
    assert tokens.role_of[tokenizer.eos_token_id] == "eos" and not tokens.bytes[tokenizer.eos_token_id]
    if tokenizer.unk_token_id is not None:
        assert tokens.role_of[tokenizer.unk_token_id] == "unk"


def test_no_space_is_put_before_a_text(family):
    _, tokens = family
    assert spelled(tokens, tokens.encode("dog")) == b"dog" and tokens.encode("dog").ends[-1] == 3


def test_ids_are_those_of_the_tokenizer_where_no_space_is_added(made):
    for name in ("byte_level", "byte_level_nfc", "metaspace_never"):
        tokenizer, tokens = made[name]
        for text in SAMPLES:
            if "<s>" not in text and "<unk>" not in text and "<|" not in text:
                assert tokens.encode(text).ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_byte_tokens_listed_as_special_are_bytes(made):
    _, tokens = made["metaspace_always"]
    index = next(i for i, piece in tokens.content.items() if piece == "<0x0A>")
    assert tokens.bytes[index] == b"\n" and tokens.is_text[index]


def test_all_256_bytes_can_be_written(family):
    _, tokens = family
    assert {bytes([b]) for b in range(256)} <= set(tokens.ids_by_bytes)


def test_duplicates_list_the_token_in_use_first(made):
    _, tokens = made["sentencepiece_bpe"]
    ids = tokens.ids_by_bytes[b"a"]
    assert len(ids) == 2 and tokens.content[ids[0]] == "a" and tokens.content[ids[1]] == "<0x61>"
    assert tokens.encode("a").ids.tolist() == [ids[0]]


def test_added_tokens():
    tokenizer = add(byte_level(), "<think>", "    ")
    tokenizer = add(tokenizer, "<|im_end|>", "<|tool|>", special=True)
    tokens = TokenBytes.from_tokenizer(tokenizer)
    think, spaces, end, tool = tokenizer.convert_tokens_to_ids(["<think>", "    ", "<|im_end|>", "<|tool|>"])
    assert tokens.bytes[think] == b"<think>" and tokens.bytes[spaces] == b"    "
    assert tokens.roles["eot"] == end and tokens.role_of[tool] == "other"
    ids = tokens.encode("a<think>b    <|im_end|>").ids
    assert think in ids and spaces in ids and end not in ids
    assert spelled(tokens, tokens.encode("a<think>b    <|im_end|>")) == b"a<think>b    <|im_end|>"


def test_added_token_that_eats_white_space_gives_it_back():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("[X]", lstrip=True, rstrip=True)])
    tokens = TokenBytes.from_tokenizer(tokenizer)
    assert spelled(tokens, tokens.encode("a  [X]  b")) == b"a  [X]  b"


def test_unigram_special_pieces_in_the_model_are_not_found_in_text():
    tokens = TokenBytes.from_tokenizer(unigram())
    assert tokens.is_text[tokens.encode("x</s><unk><s>").ids].all()


def test_padded_head():
    tokenizer = byte_level()
    tokens = TokenBytes.from_tokenizer(tokenizer, width=512)
    assert tokens.n_tokens == len(tokenizer) and len(tokens.bytes) == 512
    assert not tokens.is_text[len(tokenizer) :].any() and tokens.role_of[511] == "padding"
    with pytest.raises(TokenizerError, match="400 tokens do not fit a head of 300 rows"):
        TokenBytes.from_tokenizer(tokenizer, width=300)


def test_wordpiece_is_lossy_and_its_ends_are_the_tokenizer_s():
    tokenizer = wordpiece()
    tokens = TokenBytes.from_tokenizer(tokenizer)
    assert tokens.lossy
    text = "the  quick fox\njumps"
    encoded = tokens.encode(text)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert encoded.ends.tolist() == [end for _, end in offsets]
    ids = {data: index for index, data in enumerate(tokens.bytes)}
    assert b" the" in ids and tokens.content[ids[b" the"]] == "the"


def test_characters_it_does_not_know_end_where_the_tokenizer_says():
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -1.0), ("e", -2.0)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokens = TokenBytes.from_tokenizer(tokenizer)
    encoded = tokens.encode("a日e")
    assert encoded.ends.tolist() == [1, 4, 5] and encoded.ids.tolist() == [2, 0, 3]


def test_hash_tells_tokenizers_apart(made):
    hashes = [tokens.hash for _, tokens in made.values()]
    assert len(set(hashes)) >= len(hashes) - 2  # with and without dummy space is the same vocabulary here
    assert TokenBytes.from_tokenizer(sentencepiece_bpe()).hash == made["sentencepiece_bpe"][1].hash


def test_unknown_decoder_is_refused_by_name():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.decoder = decoders.BPEDecoder()
    with pytest.raises(TokenizerError, match="its decoder is BPEDecoder"):
        TokenBytes.from_tokenizer(tokenizer)


def test_slow_tokenizer_is_refused():
    with pytest.raises(TokenizerError, match="not a fast tokenizer"):
        TokenBytes.from_tokenizer(object())


def test_self_check_shows_the_sample():
    tokenizer = byte_level(pattern=pre_tokenizers.Split(" ", "removed"))
    with pytest.raises(TokenizerError, match="'The quick brown fox' spell b'Thequickbrownfox'"):
        TokenBytes.from_tokenizer(tokenizer)


def test_self_check_finds_a_decoder_that_disagrees():
    tokenizer = sentencepiece_bpe()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["decoder"] = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "Replace", "pattern": {"String": "x"}, "content": "y"},
        {"type": "ByteFallback"}, {"type": "Fuse"}]}  # fmt: skip
    with pytest.raises(TokenizerError, match="was read as .* but decodes to"):
        TokenBytes.from_tokenizer(Tokenizer.from_str(json.dumps(state)))


def test_testbed_tokenizers(tiny_testbed):
    from chassis.models import load_causal_lm

    for folder in (tiny_testbed.base, tiny_testbed.other_expert):
        tokens = TokenBytes.from_tokenizer(load_causal_lm(folder)[1])
        text = tiny_testbed.documents["source"]["test"][0].text
        assert np.array_equal(tokens.lengths[tokens.encode(text).ids].cumsum(), tokens.encode(text).ends)
