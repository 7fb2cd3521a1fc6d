"""Semantic heads: maps between unembeddings and between hidden states, in closed form."""

import numpy as np
import pytest
import torch
from chassis.bridge import Bridge
from chassis.bridge.expert import BridgedExpert
from chassis.bridge.matching_pursuit import matching_pursuit
from chassis.bridge.reading import Models, read
from chassis.bridge.semantic import ALPHA, MODES, OnOpenMass, SemanticHead, head_by_rows, head_by_states
from chassis.bridge.windows import text_windows
from chassis.checkpoint import Checkpoint
from chassis.errors import BridgeError
from chassis.experts import Readout
from chassis.fit import collect
from chassis.models import capture, inspect_head
from chassis.probes import Probe
from chassis.text.token_bytes import TokenBytes
from families import TEXTS, byte_level, sentencepiece_bpe
from support import documents

from chassis_kernels import Moments

ROWS = MODES[:-1]


@pytest.fixture(scope="module")
def bridge():
    pair = TokenBytes.from_tokenizer(byte_level(500)), TokenBytes.from_tokenizer(sentencepiece_bpe())
    return Bridge.build(*pair, "counted", TEXTS * 10)


@pytest.fixture(scope="module")
def models(bridge, tiny_lm):
    expert = tiny_lm("qwen3", vocab_size=bridge.expert.width, seed=1)
    base = tiny_lm("llama", vocab_size=bridge.base.width)
    return Models(base, inspect_head(base).logits, bridge.base.roles["bos"], expert, bridge.expert.roles["eos"])


def test_matching_pursuit_equals_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(90, 24, generator=generator, dtype=torch.float64)
    rows = torch.randn(40, 24, generator=generator, dtype=torch.float64)
    for k in (1, 5, 12):
        want = linear_model.orthogonal_mp(
            (atoms / atoms.norm(dim=1, keepdim=True)).T.numpy(), rows.T.numpy(), n_nonzero_coefs=k
        )
        found = matching_pursuit(atoms, rows, k) * atoms.norm(dim=1)
        np.testing.assert_allclose(found.T.numpy(), want, atol=1e-9)


def test_matching_pursuit_finds_a_sparse_row_and_stops_at_the_dimension():
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(60, 16, generator=generator)
    atoms[7] = 2 * atoms[3]  # the same direction twice
    rows = torch.stack([3 * atoms[5], atoms[3] - 2 * atoms[9]])
    assert torch.allclose(matching_pursuit(atoms, rows, 4) @ atoms, rows, atol=1e-4)
    whole = torch.randn(9, 16, generator=generator)
    assert torch.allclose(matching_pursuit(atoms, whole, 64) @ atoms, whole, atol=1e-3)
    with pytest.raises(ValueError, match="k is 0"):
        matching_pursuit(atoms, rows, 0)


def rotated(bridge, width=12, bias=False):
    """An expert's unembedding that is the base's turned, shifted, and read by other tokens; the heads must find that out."""
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    by_bytes = {data: torch.randn(width, generator=generator) for data in sorted({*bridge.expert.bytes, *bridge.base.bytes})}
    W = torch.stack([by_bytes[data] for data in bridge.base.bytes])
    E = 1.7 * torch.stack([by_bytes[data] for data in bridge.expert.bytes]) @ turn + torch.randn(width, generator=generator)
    return Readout(W), Readout(E, torch.zeros(len(E)) if bias else None), 1.7 * turn


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", ROWS)
def test_a_rotated_vocabulary_is_read_exactly(bridge, mode, bias):
    base, expert, turn = rotated(bridge, bias=bias)
    head = head_by_rows(mode, bridge, base, expert)
    hidden = torch.randn(5, 12, generator=torch.Generator().manual_seed(4))
    tokens = sorted(ids[0] for ids in bridge.base.ids_by_bytes.values())
    log_q = head.log_q(hidden)
    want = (hidden @ turn.T @ base.weight.T)[:, tokens]
    found = log_q[:, tokens]
    found, want = (x - x.mean(1, keepdim=True) for x in (found, want))
    assert torch.allclose(found, want, atol=float(2 * ALPHA * want.abs().max()))  # ridge shrinks
    assert torch.allclose(log_q.exp().sum(1), torch.ones(5), atol=1e-6)
    said = {*tokens, bridge.base.roles["eos"]}
    assert set(head.known.nonzero()[:, 0].tolist()) == said


def test_heads_read_a_window_from_the_text_before_each_token_alone(bridge, models):
    base, expert = (Readout.of(inspect_head(model)) for model in (models.base_model, models.expert_model))
    heads = [head_by_rows(mode, bridge, base, expert) for mode in ROWS]
    readings = [read(models, bridge, part) for text in TEXTS for part in text_windows(bridge, text, 32)]
    heads.append(head_by_states(bridge, base, readings))
    whole, cut = (
        read(models, bridge, next(text_windows(bridge, text, 64))) for text in ("the quick brown", "the quick fox 日")
    )
    same = int(np.argmin(whole.plan.base_ids[:4] == cut.plan.base_ids[:4]))
    assert same >= 2
    for head in heads:
        one, other = head.apply(bridge, whole), head.apply(bridge, cut)
        assert torch.allclose(one.log_q.exp().sum(1), torch.ones(len(whole.plan)), atol=1e-5)
        assert torch.allclose(one.log_q[:same], other.log_q[:same], atol=1e-4)
        assert one.uncertainty.isnan().all() and torch.isfinite(bridge.nll(whole.plan, one)).all()
        blocked = torch.from_numpy(bridge.mask.blocked_after(int(whole.plan.base_ids[0]))).long()
        assert (one.log_q[1, blocked] == -torch.inf).all()


def test_what_is_read_is_what_the_unembedding_reads(bridge, models):
    reading = read(models, bridge, next(text_windows(bridge, TEXTS[0], 48)))
    assert torch.allclose(inspect_head(models.expert_model).logits(reading.hidden), reading.logits, atol=1e-5)
    log_p = models.base_logits(reading.base_hidden).log_softmax(-1)
    assert torch.allclose(log_p, reading.log_p, atol=1e-5) and len(log_p) == len(reading.plan)
    nodes = reading.ended(bridge)
    for position, node in enumerate(nodes.tolist()):
        spelled = b"".join(bridge.expert.bytes[t] for t in reading.plan.tree.path(node))
        assert spelled == reading.plan.data[: reading.plan.begins[position]]


def test_hidden_ridge_is_the_ridge_of_the_states_it_saw(bridge, models):
    readings = [read(models, bridge, part) for text in TEXTS for part in text_windows(bridge, text, 48)]
    head = head_by_states(bridge, Readout.of(inspect_head(models.base_model)), readings)
    x, y = [], []
    for reading in readings:
        kept = reading.scored
        x.append(reading.hidden[torch.from_numpy(reading.ended(bridge))][kept]), y.append(reading.base_hidden[kept])
    x, y = torch.cat(x).double(), torch.cat(y).double()
    xc, yc = x - x.mean(0), y - y.mean(0)
    S = xc.T @ xc
    W = torch.linalg.solve(S + 1e-3 * S.trace() / len(S) * torch.eye(len(S)), xc.T @ yc)
    assert torch.allclose(head.change[0].double(), W, atol=1e-4)
    assert torch.allclose(head.change[1].double(), y.mean(0) - x.mean(0) @ W, atol=1e-4)


def test_a_head_that_says_the_unigram_gives_the_counts_back(bridge, models):
    """p_B · M / unigram with p_B the unigram is M; a head that knows more moves open mass alone."""
    flat = torch.zeros(bridge.base.width, 32)
    says_nothing = SemanticHead("none", Readout(flat, bridge.unigram.log().float()), torch.ones(len(flat), dtype=torch.bool))
    reading = read(models, bridge, next(text_windows(bridge, TEXTS[0], 48)))
    counted = bridge.apply(reading.plan, reading.logits)
    same = OnOpenMass(says_nothing, bridge.asking_base()).apply(bridge, reading)
    assert torch.allclose(same.log_q.exp(), counted.log_q.exp(), atol=1e-5)
    assert torch.allclose(same.uncertainty, counted.uncertainty, atol=1e-4)
    base = Readout.of(inspect_head(models.base_model))
    other = OnOpenMass(head_by_states(bridge, base, [reading]), bridge.asking_base()).apply(bridge, reading)
    moved = (other.log_q.exp() - counted.log_q.exp()).abs().sum(1) / 2
    assert (moved > 1e-3).any() and torch.allclose(other.log_q.exp().sum(1), torch.ones(len(moved)), atol=1e-5)


def test_bad_input(bridge):
    base, expert, _ = rotated(bridge)
    wide = Readout(torch.randn(bridge.base.width, 400))
    for message, call in {
        "expected one of ridge": lambda: head_by_rows("guess", bridge, base, expert),
        "expected twice as many": lambda: head_by_rows("ridge", bridge, wide, expert),
        "no place where tokens of both end": lambda: head_by_states(bridge, base, []),
    }.items():
        with pytest.raises(BridgeError, match=message):
            pytest.fail(f"accepted: {message}, {call()}")


def test_an_expert_is_fitted_to_all_of_a_document(tiny_lm, tiny_tokenizer):
    tokens = TokenBytes.from_tokenizer(tiny_tokenizer)
    bos = tokens.roles["eos"]
    through = BridgedExpert(tiny_lm("llama"), Bridge.build(tokens, tokens, "canonical"), bos, bos)
    (document,) = documents(1, length=200)
    windows = through.windows([document], 32)
    assert len(windows) > 4 and all(len(window.ids) <= 32 for window in windows)
    assert sum(window.n_bytes for window in windows) == len(document.text.encode())


def test_the_change_towards_oneself_is_none_and_towards_another_is_the_lens(tiny_lm, tiny_tokenizer):
    """On one tokenizer the head is the expert's own unembedding, and the change that of the ridge between the states."""
    tokens, base, other = TokenBytes.from_tokenizer(tiny_tokenizer), tiny_lm("llama"), tiny_lm("qwen3", seed=1)
    bridge = Bridge.build(tokens, tokens, "canonical")

    def change(expert):
        through = BridgedExpert(expert, bridge, tokens.roles["eos"], tokens.roles["eos"])
        windows = through.windows(documents(24, length=200), 48)[:16]
        readout = Readout.of(inspect_head(base))
        statistics = collect(Probe(base, through), readout, windows, Checkpoint(None, ""), lambda *_: None)
        assert statistics.pairs.rows == sum(len(window.ids) - 1 for window in windows)  # nothing follows the last row
        found = through.semantic_change(readout, statistics.pairs, 1e-9)
        return found.factor @ torch.cat(found.joint, 1).double().T, found.bias, windows

    same, shift, _ = change(base)
    own = base.get_output_embeddings().weight.detach().double()
    text = tokens.is_text
    assert same[:, text].abs().max() < 1e-3 * own.abs().max() and shift[text].abs().max() < 1e-2
    found, _, windows = change(other)
    x, y = (
        torch.cat([capture(model, torch.from_numpy(w.ids).long()[None]).final[0, :-1] for w in windows])
        for model in (base, other)
    )
    lens = torch.linalg.lstsq((x - x.mean(0)).double(), (y - y.mean(0)).double()).solution
    expected = lens @ other.get_output_embeddings().weight.detach().double().T - own.T
    assert (found - expected)[:, text].norm() < 0.05 * expected[:, text].norm()


def test_pairs_of_states_of_an_interrupted_pass_are_those_of_a_whole_one(tiny_lm, tiny_tokenizer, tmp_path):
    tokens, base, other = TokenBytes.from_tokenizer(tiny_tokenizer), tiny_lm("llama"), tiny_lm("qwen3", seed=1)
    bridge, readout = Bridge.build(tokens, tokens, "canonical"), Readout.of(inspect_head(base))

    def stop(stage, done, total):
        if done == 2:
            raise KeyboardInterrupt

    def run(folder, progress):
        through = BridgedExpert(other, bridge, tokens.roles["eos"], tokens.roles["eos"])
        windows = through.windows(documents(24, length=200), 48)[:16]
        probe = Probe(base, through, batch_size=4)
        return collect(probe, readout, windows, Checkpoint(folder, "", every_seconds=0), progress).state_dict()

    whole = run(None, lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop)
    found = run(tmp_path, lambda *_: None)
    assert whole["pairs.rows"] > 0 and all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_rows_that_are_no_numbers_are_no_pairs(tiny_lm, tiny_tokenizer):
    tokens = TokenBytes.from_tokenizer(tiny_tokenizer)
    through = BridgedExpert(tiny_lm("qwen3"), Bridge.build(tokens, tokens, "canonical"), 0, None)
    (window,) = through.windows(documents(1, length=40), 48)[:1]
    ids = torch.from_numpy(window.ids).long()[None]
    final, pairs = torch.ones(1, ids.shape[1], 8), Moments(8, through.width)
    final[0, 1] = torch.nan
    through.rows(ids, torch.ones_like(ids), final, pairs)
    assert pairs.rows == ids.shape[1] - 2 and torch.isfinite(pairs.mean_x).all()


def test_a_change_between_heads_that_cap_differently_is_refused(tiny_lm, tiny_tokenizer):
    tokens = TokenBytes.from_tokenizer(tiny_tokenizer)
    base, bridge = Readout.of(inspect_head(tiny_lm("llama"))), Bridge.build(tokens, tokens, "canonical")
    expert = BridgedExpert(tiny_lm("gemma2"), bridge, 0, None)
    pairs = Moments(base.weight.shape[1], expert.width)
    with pytest.raises(BridgeError, match="caps its logits at None and the expert at 3.0"):
        expert.semantic_change(base, pairs, 1e-4)
    with pytest.raises(BridgeError, match="no place of the text where tokens of both models end"):
        BridgedExpert(tiny_lm("qwen3"), bridge, 0, None).semantic_change(base, pairs, 1e-4)
