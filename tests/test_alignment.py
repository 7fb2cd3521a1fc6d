"""Alignment against a brute force over byte positions, on real tokenizers, and the golden token strings."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from chassis.errors import ChassisError
from chassis.models import load_tokenizer
from chassis.testbed.tokenizers import byte_level, sentencepiece_style
from chassis.text.alignment import align
from chassis.text.samples import SAMPLES
from chassis.text.spans import chat_spans, text_spans
from chassis.text.token_strings import align_tokens, piece_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

GOLDEN = json.loads((Path(__file__).parent / "data/alignment.json").read_text())
WORDS = "the quick brown fox jumps over the lazy dog def f(x):\n    return x + 1\n"
MIXED = [
    "héllo wörld 你好 世界 👩‍👩‍👧 é \r\n\tx = 1\r\n",
    "日本語テキスト、emoji 😀😃 and tabs\t\t\tend",
    "  leading  and   runs ",
    "नमस्ते दुनिया",
    "a",
    "\n\n",
    "",
]


@pytest.fixture(scope="module")
def tokenizers():
    return sentencepiece_style([WORDS] * 4, 330), byte_level([WORDS] * 4, 300)


def ends(tokenizer, text):
    """Byte at which each token of text ends, by decoding longer and longer prefixes of the ids."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [len(text[:stop].encode()) for _, stop in encoding["offset_mapping"]]


def brute(student, teacher):
    """Chunk of each token when both lists of ends close a chunk at every end they share."""
    shared = sorted(set(student) & set(teacher) - {0})
    return [[next(i for i, s in enumerate(shared) if s >= e) for e in side] for side in (student, teacher)], len(shared)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_token_strings(name):
    case = GOLDEN[name]
    found = align_tokens(case["student"], case["teacher"])
    assert found.student_chunk_id.tolist() == [case["student_chunk_id"]]
    assert found.teacher_chunk_id.tolist() == [case["teacher_chunk_id"]]
    assert found.pair_valid.tolist() == [case["pair_valid"]]
    assert found.pair_is_correct.tolist() == [case["pair_is_correct"]]
    assert found.num_chunks.tolist() == [case["num_chunks"]]
    assert found.student_exact_partition_mask.tolist() == [case["student_exact"]]
    assert found.teacher_exact_partition_mask.tolist() == [case["teacher_exact"]]


def check_against_brute_force(tokenizers, texts, padding_side="right"):
    spans = [text_spans(t, texts, add_special_tokens=False, padding_side=padding_side) for t in tokenizers]
    found = align(*spans)
    for row, text in enumerate(texts):
        expected, n = brute(*(ends(t, text) for t in tokenizers))
        for side, ids, own in zip(spans, (found.student_chunk_id, found.teacher_chunk_id), expected, strict=True):
            assert ids[row][torch.from_numpy(side.mask[row])].tolist() == own
            assert (ids[row][torch.from_numpy(~side.mask[row])] == -1).all()
        assert found.num_chunks[row] == n == found.pair_valid[row].sum() == found.pair_is_correct[row].sum()
    return found


@pytest.mark.parametrize("side", ["left", "right"])
def test_chunks_are_the_shared_byte_ends(tokenizers, side):
    check_against_brute_force(tokenizers, MIXED, side)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=4))
def test_any_strings(tokenizers, texts):
    found = check_against_brute_force(tokenizers, texts)
    assert found.student_chunk_id.shape[0] == len(texts)


@pytest.mark.parametrize("kind", ["English", "code", "mixed Unicode"])
def test_chunks_of_held_out_text_are_correct(tiny_testbed, kind):
    """At least 99 % of the chunks that cover text, in texts that spell out no special token."""
    held_out = {"English": "prose", "code": "source"}
    if kind in held_out:
        texts = [document.text for document in tiny_testbed.documents[held_out[kind]]["test"][:20]]
    else:
        texts = [*MIXED, *(text for text in SAMPLES if "<" not in text)]
    spans = [text_spans(load_tokenizer(folder), texts) for folder in (tiny_testbed.base, tiny_testbed.other_expert)]
    found = align(*spans)
    covers = torch.zeros_like(found.pair_valid)
    for side, ids in zip(spans, found[:2], strict=True):
        row, place = np.nonzero((side.role == 0) & (side.end >= 0))
        covers[row, ids[row, place]] = True
    assert covers.sum() > 1000 and found.pair_is_correct[covers].double().mean() >= 0.99


def test_exact_partitions_are_single_tokens_of_the_same_bytes(tokenizers):
    spans = [text_spans(t, [WORDS], add_special_tokens=False) for t in tokenizers]
    found = align(*spans)
    for chunk in range(int(found.num_chunks)):
        counts = [(ids == chunk).sum().item() for ids in found[:2]]
        for ids, exact in ((found[0], found[4]), (found[1], found[5])):
            assert (exact[ids == chunk] == (counts == [1, 1])).all()


def test_special_tokens_pair_by_role_and_a_lone_one_stays_invalid(tokenizers):
    student, teacher = tokenizers
    found = align(text_spans(student, ["the fox"]), text_spans(teacher, ["the fox"]))
    assert found.student_chunk_id[0, 0] == 0  # the student alone opens with <s>
    assert not found.pair_valid[0, 0] and found.pair_valid[0, 1:].all()
    ids = [text_spans(t, ["the fox"]) for t in (student, student)]
    both = align(*ids)
    assert both.pair_valid.all() and both.student_exact_partition_mask.all()


def test_truncation_closes_the_last_chunk_at_the_shorter_text(tokenizers):
    long = [text_spans(t, [WORDS], add_special_tokens=False) for t in tokenizers]
    short = text_spans(tokenizers[1], [WORDS], add_special_tokens=False, max_length=5)
    whole, cut = align(*long), align(long[0], short)
    shared = set(long[0].end[0].tolist()) & set(short.end[0].tolist())
    assert cut.pair_valid.sum() == len(shared)
    rest = cut.student_chunk_id[0] == len(shared)
    assert rest.any() and not cut.pair_valid[0, len(shared)] and cut.num_chunks[0] == len(shared) + 1
    kept = cut.pair_valid[0].sum()
    agree = whole.student_chunk_id[0] < kept
    assert torch.equal(whole.student_chunk_id[0][agree], cut.student_chunk_id[0][agree])


def test_unknown_tokens_are_valid_but_not_correct(tokenizers):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"the": 0, "fox": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    found = align(*(text_spans(t, ["the strange fox"], add_special_tokens=False) for t in (tokenizers[0], words)))
    assert found.pair_valid.sum() == 3 and found.pair_is_correct[0].tolist() == [True, False, True]


def test_a_token_that_leaves_bytes_out_is_not_correct(tokenizers):
    spans = [text_spans(t, ["the fox"], add_special_tokens=False) for t in tokenizers]
    short = spans[1]._replace(start=spans[1].start.copy())
    short.start[0, -1] = short.end[0, -1] - 1
    assert align(*spans).pair_is_correct.all()
    assert align(spans[0], short).pair_is_correct[0].tolist()[-1] is False


def test_chats_align_on_their_contents_whatever_the_templates(tokenizers):
    student, teacher = tokenizers
    student.chat_template = "{% for m in messages %}<s>[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    teacher.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>\n{% endfor %}"
    chat = [
        {"role": "user", "content": "the fox"},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "jumps over é"},
    ]
    a, b = (chat_spans(t, [chat]) for t in (student, teacher))
    found = align(a, b)
    assert a.texts == b.texts == ("the foxjumps over é".encode(),)
    assert found.pair_is_correct.sum() == found.pair_valid.sum() >= 2
    covered = {byte for s, e in zip(a.start[0], a.end[0], strict=True) if e >= 0 for byte in range(s, e)}
    assert covered == set(range(len(a.texts[0])))
    assert (found.student_chunk_id[0][torch.from_numpy(a.role[0] > 0)] == -1).all()
    with pytest.raises(ChassisError, match="leaves out, repeats or rewrites"):
        teacher.chat_template = "{{ messages[0].content | upper }}"
        chat_spans(teacher, [chat])


def test_bad_input_is_refused(tokenizers):
    student, teacher = tokenizers
    with pytest.raises(ChassisError, match=r"sample 1: the student's text \(1 bytes\) is not the teacher's \(2 bytes\)"):
        align(text_spans(student, ["a", "b"]), text_spans(teacher, ["a", "bb"]))
    with pytest.raises(ChassisError, match="2 texts on the student's side and 1"):
        align(text_spans(student, ["a", "b"]), text_spans(teacher, ["a"]))
    with pytest.raises(ChassisError, match="padding_side 'middle'"):
        text_spans(student, ["a"], padding_side="middle")
    with pytest.raises(ChassisError, match="max_length 0"):
        text_spans(student, ["a"], max_length=0)
    with pytest.raises(ChassisError, match="not a fast tokenizer"):
        text_spans(object(), ["a"])


def test_empty_batches(tokenizers):
    found = align(*(text_spans(t, []) for t in tokenizers))
    assert found.num_chunks.shape == (0,) and found.pair_valid.shape == (0, 0)
    found = align(*(text_spans(t, ["", ""], add_special_tokens=False) for t in tokenizers))
    assert found.num_chunks.tolist() == [0, 0]


def test_pieces_of_each_alphabet():
    assert piece_bytes(["Ġhello", "Ċ", "Ã©"]) == [b" hello", b"\n", "é".encode()]
    assert piece_bytes(["▁hello", "<0x0A>", "é"]) == [b" hello", b"\n", "é".encode()]
    assert piece_bytes(["201", "_cats"]) == [b"201", b"_cats"]


def test_pieces_that_differ_align_around_the_difference():
    found = align_tokens(["▁the", "▁caf", "é", "▁is", "▁open"], ["▁the", "▁cafe", "▁is", "▁op", "en"])
    assert found.student_chunk_id.tolist() == [[0, 1, 1, 2, 3]]
    assert found.teacher_chunk_id.tolist() == [[0, 1, 2, 3, 3]]
    assert found.pair_is_correct.tolist() == [[True, False, True, True]]
    assert found.student_exact_partition_mask.tolist() == [[True, False, False, True, False]]


def test_one_moved_trigram_costs_the_chunks_it_stands_in():
    words = [f"▁w{i}" for i in range(300)]
    moved = [*words[:100], *words[103:140], *words[100:103], *words[140:]]
    found = align_tokens(words, moved)
    assert found.pair_is_correct.sum() >= 280


def test_pieces_of_other_texts_are_refused():
    random.seed(0)
    long = [["".join(random.choices("abcd", k=9)) for _ in range(2000)] for _ in range(2)]
    with pytest.raises(ChassisError, match="expected the same text on both sides"):
        align_tokens(*long)


def test_offsets_that_leave_out_the_space_are_correct(tokenizers):
    student, teacher = tokenizers
    spans = text_spans(teacher, ["the quick fox"], add_special_tokens=False)
    trimmed = spans._replace(start=np.where(spans.start > 0, spans.start + 1, spans.start))
    assert align(text_spans(student, ["the quick fox"], add_special_tokens=False), trimmed).pair_valid.all()
