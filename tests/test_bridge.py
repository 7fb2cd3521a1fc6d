import json
import math
import warnings

import numpy as np
import pytest
import torch
from bridge_problems import bpe, random_logits
from chassis.bridge import Bridge, ExpertStates, lookahead, text_windows, tree_logits
from chassis.bridge.canonical import CanonicalMask
from chassis.bridge.lookahead import lookaheads
from chassis.bridge.rules import METHODS
from chassis.errors import BridgeError
from chassis.text.token_bytes import TokenBytes
from families import TEXTS, add, byte_level, metaspace_bpe, sentencepiece_bpe, unigram, wordpiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from chassis_kernels import BridgeTable

WORDS = ["the quick brown fox", " jumps over", "\n    return x + 1\n", "naïve 日本 🙂", "12345", "dog's don't"]


@pytest.fixture(scope="module")
def expert():
    return TokenBytes.from_tokenizer(byte_level(500))


@pytest.fixture(scope="module")
def base():
    return TokenBytes.from_tokenizer(sentencepiece_bpe())


@pytest.fixture(scope="module")
def counted(expert, base):
    return Bridge.build(expert, base, "counted", TEXTS * 10)


def test_probabilities_sum_to_one_and_nothing_is_unmapped(counted):
    for text in WORDS:
        plan = counted.plan(text)
        result = counted.apply(plan, random_logits(plan, counted.expert.width))
        assert torch.allclose(result.log_q.exp().sum(1), torch.ones(len(plan)), atol=1e-6)
        assert torch.allclose(result.mass, torch.ones(len(plan)), atol=1e-5)
        assert ((0 <= result.uncertainty) & (result.uncertainty <= 1 + 1e-6)).all()


def test_end_of_text_goes_to_the_end_of_text(counted):
    plan = counted.plan("the dog")
    logits = torch.full((len(plan.tree), counted.expert.width), -30.0)
    logits[:, counted.expert.roles["eos"]] = 30.0
    result = counted.apply(plan, logits)
    assert result.log_q[0, counted.base.roles["eos"]] == pytest.approx(0, abs=1e-5)


@settings(max_examples=80, deadline=None)
@given(st.text("the quickbro\n dog's123日", max_size=12), st.text("the quickbro\n dog's123日", max_size=8))
def test_what_comes_later_changes_nothing(counted, before, after):
    """At every position of `before` that is one of `before + after` too, with the same base tokens so far, q is the same."""
    short, long = counted.plan(before), counted.plan(before + after)
    results = [counted.apply(plan, random_logits(plan, counted.expert.width)).log_q for plan in (short, long)]
    for i in range(min(len(short), len(long))):
        if not np.array_equal(short.base_ids[:i], long.base_ids[:i]):
            break
        assert torch.allclose(results[0][i], results[1][i], atol=1e-5)


def test_same_tokenizer_is_bit_exact(expert):
    bridge = Bridge.build(expert, TokenBytes.from_tokenizer(byte_level(500)), "canonical")
    plan = bridge.plan("the quick brown fox")
    logits = random_logits(plan, expert.width)
    result = bridge.apply(plan, logits)
    assert torch.equal(result.log_q, torch.log_softmax(logits[: len(plan)], 1)) and not result.uncertainty.any()
    assert np.array_equal(plan.expert_ids, plan.base_ids)
    assert torch.equal(bridge.project(logits).log_q, torch.log_softmax(logits, 1))


def text_of(tokens, index):
    return tokens.bytes[index].decode(errors="ignore")


@pytest.mark.parametrize("method", ["canonical", "exact", "counted"])
def test_a_permuted_vocabulary_permutes_the_probabilities(expert, method):
    """The control of what a bridge itself costs: the same tokens under other ids."""
    state = json.loads(byte_level(500).backend_tokenizer.to_str())
    order = np.append(0, 1 + np.random.default_rng(0).permutation(expert.width - 1))
    state["model"]["vocab"] = {piece: int(order[index]) for piece, index in state["model"]["vocab"].items()}
    permuted = TokenBytes.from_tokenizer(Tokenizer.from_str(json.dumps(state)))
    permuted.roles["eos"], permuted.role_of[0] = 0, "eos"  # a bare tokenizer names no roles
    bridge = Bridge.build(expert, permuted, method, TEXTS * 10)
    assert not bridge.identical and bridge.coverage()["byte_equal_share"] == 1
    plan = bridge.plan("the quick brown fox\n    jumps")
    logits = random_logits(plan, expert.width)
    projected = bridge.project(logits).log_q.exp()
    alone = [i for i in np.flatnonzero(expert.is_text).tolist() if expert.encode(text_of(expert, i)).ids.tolist() == [i]]
    assert len(alone) > 200 and (bridge.table.dense()[alone, order[alone]] == 1).all()
    if method == "exact":  # by the others, tokens that no text is cut into stand for those it is cut into
        assert torch.allclose(projected[:, order], logits.softmax(1), atol=1e-6)
    result = bridge.apply(plan, logits, masked=False)
    known = [i for i in range(len(plan)) if len(plan.complete[i]) == 1 and not plan.under_way[i]]
    assert len(known) >= 4
    for i in known:
        assert torch.allclose(result.log_q[i].exp()[order], projected[plan.complete[i][0]][order], atol=1e-6)


def test_byte_level_base_equals_brute_force():
    """Every state and every expert token, asked one by one which byte it puts next."""
    expert, base = bpe("ab c", ("a", "b"), (" ", "c"), ("ab", "a"), ("b", "c")), bpe("ab c")
    bridge = Bridge.build(expert, base, "canonical")
    for text in ("abab cab", "bbca abc", "cc  abba"):
        plan = bridge.plan(text)
        logits = random_logits(plan, expert.width)
        p = logits.double().softmax(1)
        node_of = {tuple(plan.tree.path(node)): node for node in range(len(plan.tree))}
        result = bridge.apply(plan, logits, masked=False)
        for position in range(len(plan)):
            want = torch.zeros(base.width, dtype=torch.float64)
            for end in range(position + 1):
                path = expert.encode(text[:end]).ids.tolist()
                weight = math.prod(
                    float(p[node_of[tuple(path[:i])], path[i]]) for i in range(len(path)) if path[:i] is not None
                )
                for token in range(expert.width):
                    string = text[:end] + expert.bytes[token].decode()
                    fits = string.startswith(text[:position]) and len(string) > position
                    if fits and expert.encode(string).ids.tolist() == [*path, token] or fits and end == position:
                        want[base.ids_by_bytes[string[position].encode()][0]] += weight * float(
                            p[node_of[tuple(path)], token]
                        )
            assert torch.allclose(result.log_q[position].double().exp(), want / want.sum(), atol=1e-6)


def test_toy_language_equals_its_exact_distribution():
    """Letters a and b, even odds. The expert knows ab, the base ba, so that tokens of one cut those of the other."""
    expert, base = bpe("ab", ("a", "b")), bpe("ab", ("b", "a"))
    bridge = Bridge.build(expert, base, "canonical")
    rows, half = bridge.leaves.strings.index(b"b", 3), torch.tensor([1.0, 0.5, 0.5, 1.0, 0.5, 0.5])
    entries = torch.tensor([0, 1, 1, 2, rows, rows]), torch.tensor([0, 1, 2, 0, 1, 2])
    bridge.table = BridgeTable.from_entries(*entries, half, (len(bridge.leaves), 3), n_expert=3)
    plan = bridge.plan("abbaabababbbaaab")
    after_a = torch.tensor([0.5, 0.0, 0.5]).log()  # "ab" would have been one token
    logits = torch.tensor([0.25, 0.5, 0.25]).log().repeat(len(plan.tree), 1)
    logits[torch.from_numpy(plan.tree.tokens == 0)] = after_a
    result = bridge.apply(plan, logits)
    for position, previous in enumerate([-1, *plan.base_ids[:-1].tolist()]):
        want = torch.tensor([0.0, 0.5, 0.5]) if previous == 1 else torch.tensor([0.5, 0.25, 0.25])
        assert torch.allclose(result.log_q[position].exp(), want, atol=1e-6)


def test_blocked_tokens_have_no_probability(counted):
    plan = counted.plan("the quick brown fox jumps")
    logits = random_logits(plan, counted.expert.width)
    masked, free = counted.apply(plan, logits), counted.apply(plan, logits, masked=False)
    for i in range(1, len(plan)):
        blocked = torch.from_numpy(counted.mask.blocked_after(int(plan.base_ids[i - 1]))).long()
        assert (masked.log_q[i, blocked] == -math.inf).all() and free.log_q[i].exp().sum() == pytest.approx(1, abs=1e-5)
        assert plan.base_ids[i] not in blocked


@pytest.mark.parametrize("method", METHODS)
def test_string_methods(expert, base, method):
    bridge = Bridge.build(expert, base, method)
    dense = bridge.table.dense()
    token = expert.ids_by_bytes[b" the"][0]
    assert dense[token, base.ids_by_bytes[b" the"][0]] == 1 and dense[expert.roles["eos"], base.roles["eos"]] == 1
    sums = dense[: expert.width][torch.from_numpy(expert.is_text)].sum(1)
    missing = [i for i in np.flatnonzero(expert.is_text) if expert.bytes[i] not in base.ids_by_bytes]
    assert missing and (sums == 1).all() == (method in ("longest_prefix", "canonical"))
    if method == "exact":
        plan = bridge.plan("the dog")
        result = bridge.apply(plan, random_logits(plan, expert.width))
        assert (result.mass < 1).all() and torch.allclose(result.log_q.exp().sum(1), result.mass, atol=1e-5)


def test_counts_are_those_of_the_text(expert, base):
    text = "the quick brown fox jumps over the dog\n" * 300
    bridge = Bridge.build(expert, base, "counted", [text])
    one, other = expert.encode(text), base.encode(text)
    begins = {0, *one.ends.tolist()}
    n: dict = {}
    for i, b in enumerate(other.ids.tolist()):
        place = int(other.ends[i] - base.lengths[b])
        k = int(np.searchsorted(one.ends, place, side="right"))
        if place in begins:
            n[int(one.ids[k]), b] = n.get((int(one.ids[k]), b), 0) + 1
    canonical = Bridge.build(expert, base, "canonical").table.dense()
    want = canonical.clone()
    for (t, b), times in n.items():
        want[t, b] += times
    want = want / want.sum(1, keepdim=True)
    rows = sorted({t for t, _ in n})
    assert torch.allclose(bridge.table.dense()[rows], want[rows], atol=1e-6)


def test_top_k_input_leaves_its_tail_out(counted):
    plan = counted.plan("the dog")
    log_p = torch.log_softmax(random_logits(plan, counted.expert.width), 1)
    top = log_p.topk(20)
    full, part = counted.project(log_p), counted.project(log_probs=top.values, ids=top.indices)
    assert torch.allclose(part.mass, top.values.exp().sum(1), atol=1e-5)
    assert (part.log_q.exp() <= full.log_q.exp() + 1e-5).all() and (part.uncertainty >= 1 - part.mass - 1e-5).all()


def test_padded_rows_of_the_head_get_nothing(base):
    tokenizer = byte_level(500)
    bridges = [Bridge.build(TokenBytes.from_tokenizer(tokenizer, width=w), base, "canonical") for w in (None, 640)]
    plan = bridges[0].plan("the dog")
    logits = random_logits(plan, 500)
    wide = torch.cat([logits, torch.full((len(logits), 140), 50.0)], 1)
    assert torch.equal(bridges[0].apply(plan, logits).log_q, bridges[1].apply(bridges[1].plan("the dog"), wide).log_q)


def test_a_word_with_the_experts_unknown_token_is_unmapped_and_the_next_is_read_again(base):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    bridge = Bridge.build(TokenBytes.from_tokenizer(tokenizer), base, "canonical")
    plan = bridge.plan("the ლლ dog")
    unknown = bridge.expert.roles["unk"]
    assert unknown in plan.expert_ids
    result = bridge.apply(plan, random_logits(plan, bridge.expert.width))
    inside = torch.tensor([not c and not u for c, u in zip(plan.complete, plan.under_way, strict=True)])
    spaces = [i for i, begin in enumerate(plan.begins.tolist()) if plan.data[begin:].startswith(b" dog")]
    assert inside.any() and spaces and not inside[spaces[0] :].any() and not inside[:2].any()
    assert bridge.expert.encode("the ლლ").ids.tolist() in [plan.tree.path(node) for node in plan.complete[spaces[0]]]
    assert (result.mass[inside] == 0).all() and (result.uncertainty[inside] == 1).all() and (result.mass[~inside] > 0).all()
    assert torch.allclose(result.log_q.exp().sum(1), torch.ones(len(plan)), atol=1e-5)
    assert torch.allclose(result.log_q[inside].exp(), torch.tensor(1 / base.width))
    assert torch.isfinite(bridge.nll(plan, result)).all()


def test_specials_by_role_and_name():
    one = TokenBytes.from_tokenizer(add(byte_level(), "<|im_end|>", "<|tool|>", "<|only_here|>", special=True))
    other = TokenBytes.from_tokenizer(add(sentencepiece_bpe(), "<|tool|>", special=True))
    pairs = Bridge.build(one, other, "canonical").coverage()
    assert pairs["special_pairs"] == {"<|endoftext|>": "</s>", "<|im_end|>": "</s>", "<|tool|>": "<|tool|>"}
    assert pairs["special_unmapped"] == ["<|only_here|>"]


@pytest.mark.parametrize("make", [metaspace_bpe, unigram, lambda: byte_level(350)])
def test_any_pair_of_families(make, counted):
    other = TokenBytes.from_tokenizer(make())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = [Bridge.build(counted.base, other, "canonical"), Bridge.build(other, counted.base, "canonical")]
    for bridge in pairs:
        plan = bridge.plan("the dog\n\n    naïve 日本 x")
        result = bridge.apply(plan, random_logits(plan, bridge.expert.width))
        assert torch.isfinite(bridge.nll(plan, result)).all()
        assert torch.allclose(result.log_q.exp().sum(1), torch.ones(len(plan)), atol=1e-5)


def test_save_and_load(tmp_path, counted, expert, base):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = counted.save(tmp_path / "bridge.safetensors")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        earlier = file.metadata() | {"version": "1"}
    parts = "alone", "context", "split", "joined"
    assert {f"{side}.{part}" for side in ("expert", "base") for part in parts} < set(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if "." not in name}, tmp_path / "earlier", earlier)
    for file in (path, tmp_path / "earlier"):
        check_loaded(file, counted, expert, base)


def check_loaded(path, counted, expert, base):
    loaded = Bridge.load(path, expert, base)
    assert torch.equal(loaded.table.dense(), counted.table.dense()) and loaded.method == "counted"
    assert all((mask.alone == counted.masks[side].alone).all() for side, mask in loaded.masks.items())
    assert (loaded.masks["expert"].find_moves() == CanonicalMask(expert).moves(range(expert.width))).all()
    plan = counted.plan("the dog")
    logits = random_logits(plan, expert.width)
    assert torch.equal(loaded.apply(plan, logits).log_q, counted.apply(plan, logits).log_q)


def test_bad_input(tmp_path, counted, expert, base):
    path = counted.save(tmp_path / "bridge.safetensors")
    other = TokenBytes.from_tokenizer(byte_level(410))
    wide = TokenBytes.from_tokenizer(sentencepiece_bpe(), width=999)
    wrong = {
        "for another expert tokenizer": lambda: Bridge.load(path, other, base),
        "for another base tokenizer": lambda: Bridge.load(path, expert, other),
        "no such bridge": lambda: Bridge.load(tmp_path / "none", expert, base),
        "heads of other widths": lambda: Bridge.load(path, expert, wide),
        "expected one of exact": lambda: Bridge.build(expert, base, "guess"),
        "needs texts": lambda: Bridge.build(expert, base, "counted"),
        "too few to count": lambda: Bridge.build(expert, base, "counted", ["short"]),
        "drops white space": lambda: Bridge.build(TokenBytes.from_tokenizer(wordpiece()), base, "canonical"),
        "normalizers differ": lambda: Bridge.build(
            TokenBytes.from_tokenizer(byte_level(normalizer=normalizers.Lowercase())), base, "canonical"
        ),
        "a column per expert token": lambda: counted.apply(counted.plan("a b"), torch.zeros(2, 7)),
    }
    for message, call in wrong.items():
        with pytest.raises(BridgeError, match=message):
            pytest.fail(f"accepted: {message}, {call()}")
    path.write_bytes(b"\x00" * 100)
    with pytest.raises(BridgeError, match="is damaged"):
        Bridge.load(path, expert, base)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path, {"x": json.dumps(1)})
    with pytest.raises(BridgeError, match="is no bridge"):
        Bridge.load(path, expert, base)


def test_unicode_normal_forms_are_warned_of_and_joined(base):
    with pytest.warns(UserWarning, match="normalizers differ"):
        bridge = Bridge.build(TokenBytes.from_tokenizer(byte_level(normalizer=normalizers.NFC())), base, "canonical")
    plan = bridge.plan("cafe\u0301")
    assert plan.data == "café".encode()


def test_tree_in_one_pass_equals_each_path_alone(tiny_lm, tiny_tokenizer, base):
    expert = TokenBytes.from_tokenizer(tiny_tokenizer)
    bridge = Bridge.build(expert, base, "canonical")
    for architecture in ("llama", "qwen3", "gpt_neox"):
        model = tiny_lm(architecture)
        plan = bridge.plan("the quick foxes jump")
        assert len(plan.tree) > plan.tree.n_trunk + 1
        logits = tree_logits(model, plan.tree, 0)
        for node in range(len(plan.tree)):
            alone = model(input_ids=torch.tensor([[0, *plan.tree.path(node)]])).logits[0, -1]
            assert torch.allclose(logits[node], alone, atol=1e-4)
        states = ExpertStates(model, 0)
        parts = [states.grow(plan.tree.tokens[s], plan.tree.parent[s]) for s in (slice(0, 5), slice(5, None))]
        assert torch.allclose(torch.cat(parts), logits, atol=1e-4)


def test_lookahead_sums_to_one_and_lowers_uncertainty(tiny_lm, tiny_tokenizer, base):
    expert = TokenBytes.from_tokenizer(tiny_tokenizer)
    bridge = Bridge.build(expert, base, "counted", TEXTS * 10)
    model, plan = tiny_lm("llama"), bridge.plan("the quick foxes jump")
    states = ExpertStates(model, 0)
    logits = states.grow(plan.tree.tokens, plan.tree.parent)
    one, more = bridge.apply(plan, logits), lookahead(bridge, plan, states, logits, 8)
    assert torch.allclose(more.log_q.exp().sum(1), torch.ones(len(plan)), atol=1e-6)
    assert more.uncertainty.mean() < one.uncertainty.mean()


def test_smaller_lookaheads_are_read_off_one_growth(tiny_lm, tiny_tokenizer, base):
    bridge = Bridge.build(TokenBytes.from_tokenizer(tiny_tokenizer), base, "counted", TEXTS * 10)
    model, plan = tiny_lm("llama"), bridge.plan("the quick foxes jump")
    budgets, sizes = [5, 0, 13, 1, 13], []

    def grown(*budgets):
        states = ExpertStates(model, 0)
        logits = states.grow(plan.tree.tokens, plan.tree.parent)
        found = lookaheads(bridge, plan, states, logits, budgets)
        sizes.append(len(states))
        return found

    together = grown(*budgets)
    for budget, one in zip(budgets, together, strict=True):
        (alone,) = grown(budget)
        assert torch.allclose(one.log_q.exp(), alone.log_q.exp(), atol=1e-6)
        assert torch.allclose(one.uncertainty, alone.uncertainty, atol=1e-6)
    assert sizes[0] == max(sizes) and torch.equal(together[2].log_q, together[4].log_q)
    assert not torch.allclose(together[0].log_q.exp(), together[2].log_q.exp(), atol=1e-3)


@pytest.mark.parametrize("overlap", [True, False])
def test_windows_cover_the_text_once(counted, overlap):
    text = "".join(TEXTS) * 3
    windows = list(text_windows(counted, text, 64, overlap=overlap))
    assert any(w.seen for w in windows) == overlap
    assert "".join(w.text.encode()[w.seen :].decode() for w in windows) == text and len(windows) > 4
    assert all(len(counted.base.encode(w.text)) <= 64 for w in windows)
