"""Rows of hidden states: chosen by mask, the same for every padding, batch size and order; bad text refused."""

import numpy as np
import pytest
import torch
from chassis.errors import ChassisError
from chassis.experts import ModelExpert
from chassis.probes import Probe, Window, check_disjoint, check_not_fitted, make_windows, save_keys
from chassis.statistics import Statistics
from support import documents, pair, splits


@pytest.fixture(scope="module")
def models(tiny_lm, tiny_tokenizer):
    return pair(tiny_lm, tiny_tokenizer)


def gather(base, expert, windows, **options):
    statistics = Statistics(base.readout, expert.readout, layers=(0, 2))
    for rows in Probe(base.model, expert, (0, 2), **options).batches(windows):
        statistics.update(rows)
    return statistics


def close(a: Statistics, b: Statistics) -> bool:
    """Equal to fp32 rounding of the forward passes, which batch shapes may move."""
    one, two = ([s.final.S, s.final.C, s.layers[2].S, s.final.mean_y] for s in (a, b))
    pairs = zip(one, two, strict=True)
    return a.n_rows == b.n_rows and all(torch.allclose(x, y, rtol=1e-4, atol=1e-4 * float(y.abs().max())) for x, y in pairs)


@pytest.mark.parametrize("positions", ["all", "last"])
def test_padding_batch_size_and_order_do_not_change_statistics(models, positions):
    base, expert = models
    windows = make_windows(documents(9, length=17), base.tokenizer, length=24, minimum=3)
    assert len({len(window.ids) for window in windows}) > 1  # otherwise nothing is padded
    one = gather(base, expert, windows, positions=positions, batch_size=1)
    for options in ({"padding_side": "left"}, {"padding_side": "right"}, {"batch_size": 3}):
        assert close(gather(base, expert, windows, positions=positions, **options), one)
    assert close(gather(base, expert, windows[::-1], positions=positions, batch_size=4), one)


def test_last_position_takes_the_last_real_token(models):
    base, expert = models
    windows = [Window(np.arange(3, 3 + n, dtype=np.int32), "d", n) for n in (5, 9, 2)]
    for side in ("left", "right"):
        rows = Probe(base.model, expert, positions="last", padding_side=side).rows(windows)
        alone = [Probe(base.model, expert, positions="last").rows([w]).final for w in windows]
        torch.testing.assert_close(rows.final, torch.cat(alone), rtol=1e-4, atol=1e-5)
        assert rows.window.tolist() == [0, 1, 2] and rows.next_ids.tolist() == [-1, -1, -1]


def test_next_ids_and_bytes_cover_the_text(models):
    base, expert = models
    text = documents(1)[0]
    windows = make_windows([text], base.tokenizer, length=1000)
    rows = Probe(base.model, expert).rows(windows)
    assert rows.next_ids.tolist() == [*windows[0].ids[1:].tolist(), -1]
    first = base.tokenizer.decode(windows[0].ids[:1])
    assert windows[0].n_bytes == len(text.text.encode()) - len(first.encode())


def test_overlap_is_refused_by_token_ids(models, tmp_path):
    base, _ = models
    fit, other = (make_windows(documents(3, seed=s), base.tokenizer, length=32) for s in (1, 2))
    check_disjoint(fit, other)
    with pytest.raises(ChassisError, match=r"1 of \d+ evaluation windows are also in the text"):
        check_disjoint(fit, [*other, fit[0]])
    save_keys(fit, tmp_path)
    check_not_fitted(tmp_path, other)
    with pytest.raises(ChassisError, match="held out"):
        check_not_fitted(tmp_path, [fit[1]])


def test_nan_hidden_states_name_the_model_and_document(models, tiny_lm):
    base, expert = models
    broken = tiny_lm("llama", tie_word_embeddings=False)
    with torch.no_grad():
        broken.get_input_embeddings().weight[40] = float("nan")
    bad = ModelExpert(broken, base.head, "broken")
    texts = {"fine": [3, 4, 5], "doc7": [3, 40, 5]}
    windows = [Window(np.array(ids, dtype=np.int32), name, 2) for name, ids in texts.items()]
    with pytest.raises(ChassisError, match="expert 'broken' are NaN or infinite.*doc7"):
        Probe(base.model, bad).rows(windows)


def test_probe_refuses_bad_settings(models):
    base, expert = models
    for options in ({"positions": "first"}, {"padding_side": "up"}, {"batch_size": 0}):
        with pytest.raises(ChassisError, match=next(iter(options))):
            Probe(base.model, expert, **options)
    with pytest.raises(ChassisError, match="gave no window"):
        make_windows([documents(1)[0].__class__("x", "a", "s")], base.tokenizer, minimum=50)
    with pytest.raises(ChassisError, match="not a fast tokenizer"):
        make_windows(documents(1), object())


def test_repeated_windows_count_once(models):
    base, _ = models
    one = splits()["test"][:1]
    assert len(make_windows(one * 3, base.tokenizer, length=16)) == len(make_windows(one, base.tokenizer, length=16))
