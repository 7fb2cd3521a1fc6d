"""The main job on tiny models: identical after a kill, bounded memory, no [N, V], and every bad input refused early."""

import itertools
import signal
import subprocess
import sys
import time

import pytest
import torch
from chassis.adapter import Adapter
from chassis.checkpoint import NAME
from chassis.errors import ChassisError
from chassis.experts import CallableExpert, ModelExpert
from chassis.fit import Base, FitOptions, fit
from chassis.lens import Lens
from chassis.models import inspect_head
from chassis.probes import Probe, make_windows
from chassis.results import measure, summarise
from support import LiveMemory, documents, pair, splits

from chassis_kernels import pages

fit_module = sys.modules[fit.__module__]  # `chassis.fit` is the function
OPTIONS = FitOptions(rank=4, window=48, batch_size=4, refine_steps=3, checkpoint_seconds=0)


@pytest.fixture(scope="module")
def models(tiny_lm, tiny_tokenizer):
    return pair(tiny_lm, tiny_tokenizer)


def same(a: Adapter, b: Adapter) -> bool:
    return all(torch.equal(b.tensors()[name], tensor) for name, tensor in a.tensors().items())


def test_fit_gives_adapter_lens_and_report(models, tmp_path):
    base, expert = models
    result = fit(base, expert, splits(), FitOptions(rank=8, ranks=(2,), window=48, refine_steps=5), out=tmp_path)
    scores = measure(base, expert, result)
    report = summarise(base, expert, result, scores, prompts=["the quick"])
    assert same(Adapter.load(tmp_path), result.adapter) and Lens.load(tmp_path / "lens").layers == [0, 1, 2, 3, "final"]
    assert {(row["kind"], row["rank"]) for row in report["ranks"]} == {
        (kind, rank) for kind in ("closed form", "refined") for rank in (2, 8)
    }
    assert report["no_op"]["kl"] > 0 and all("share_removed" in row for row in report["layers"] + report["ranks"])
    best = next(row for row in report["ranks"] if row["rank"] == 8 and row["kind"] == "refined")
    no_op = report["no_op"]["kl"]
    assert best["kl"] < no_op and best["share_removed"] == pytest.approx(1 - best["kl"] / no_op)
    assert result.adapter.config.kl < result.adapter.config.no_op_kl
    assert not (tmp_path / NAME).exists()


def test_scores_equal_eager_log_softmax(models):
    """KL, top-1 and bits per byte against the expression a reader would write."""
    base, expert = models
    result = fit(base, expert, splits(), FitOptions(rank=4, window=48, refine_steps=0))
    scores = measure(base, expert, result)
    kl, agree, nll, n_bytes = [], [], 0.0, 0
    for window in result.windows["test"]:
        ids = torch.from_numpy(window.ids).long()[None]
        with torch.no_grad():
            a, b = base.model(ids).logits[0].double(), expert.model(ids).logits[0].double()
        p, q = b.log_softmax(-1), a.log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1))
        agree.append(p.argmax(-1) == q.argmax(-1))
        nll -= q[:-1].gather(1, ids[0, 1:, None]).sum().item()
        n_bytes += window.n_bytes
    assert scores.no_op.kl == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)
    assert scores.no_op.top1 == pytest.approx(torch.cat(agree).double().mean().item(), abs=2e-3)
    assert scores.no_op.bits_per_byte == pytest.approx(nll / 0.6931471805599453 / n_bytes, rel=1e-4)


def test_order_of_documents_does_not_change_a_bit(models):
    base, expert = models
    forwards = splits()
    backwards = {split: items[::-1] for split, items in forwards.items()}
    options = FitOptions(rank=4, window=48, refine_steps=0)
    assert same(fit(base, expert, forwards, options).adapter, fit(base, expert, backwards, options).adapter)


def test_interrupted_fit_resumes_to_the_identical_adapter(models, tmp_path):
    base, expert = models
    whole = fit(base, expert, splits(), OPTIONS).adapter

    def stop(stage, done, total):
        if stage == "statistics" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(base, expert, splits(), OPTIONS, out=tmp_path, progress=stop)
    assert (tmp_path / NAME).exists()
    stages = []
    again = fit(base, expert, splits(), OPTIONS, out=tmp_path, progress=lambda *event: stages.append(event))
    assert stages[0][:2] == ("statistics", 4)  # it went on, and did not start over
    assert same(whole, again.adapter)


JOB = """
import sys
from chassis.fit import Base, FitOptions, fit
from chassis.experts import load_expert
from chassis.models import load_causal_lm
from chassis.testbed import build

testbed = build(size="tiny")
base = Base(*load_causal_lm(testbed.base))
options = FitOptions(rank=4, window=32, batch_size=2, max_windows=600, refine_steps=0, checkpoint_seconds=0)
fit(base, load_expert(str(testbed.expert), base.head, base.tokenizer), testbed.documents["source"], options, out=sys.argv[1])
"""


def test_killed_process_leaves_a_checkpoint_to_go_on_from(tiny_testbed, tmp_path):
    """SIGKILL in the middle of a real process; the second run ends with the adapter of an undisturbed one."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-c", JOB, str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (killed / NAME).exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    errors = process.communicate()[1].decode()
    assert process.returncode == -signal.SIGKILL and (killed / NAME).exists(), errors
    for folder in (killed, whole):
        subprocess.run([*command[:-1], str(folder)], check=True, capture_output=True)
    assert same(Adapter.load(killed), Adapter.load(whole))


def test_a_checkpoint_of_another_fit_is_not_used_and_a_damaged_one_is_refused(models, tmp_path):
    base, expert = models
    stages = []

    def stop(stage, done, total):
        stages.append((stage, done))
        if stage == "statistics" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(base, expert, splits(), OPTIONS, out=tmp_path, progress=stop)
    stages.clear()
    other = splits(25)
    with pytest.raises(KeyboardInterrupt):
        fit(base, expert, other, OPTIONS, out=tmp_path, progress=stop)
    assert stages[0] == ("statistics", 0)
    (tmp_path / NAME).write_bytes(b"\x00" * 20)
    with pytest.raises(ChassisError, match="is damaged .*remove it"):
        fit(base, expert, other, OPTIONS, out=tmp_path)


def test_peak_memory_is_moments_and_four_batches(models):
    """Above the models: the moments, at most four batches of rows of all layers, and what one forward pass needs."""
    base, expert = models
    pages.keep_heap()  # once in a process; its block is never written to
    options = FitOptions(rank=4, window=48, batch_size=16, refine_steps=0)
    with LiveMemory() as forward:
        for model in (base.model, expert.model):
            with torch.no_grad():
                model.model(torch.zeros(options.batch_size, options.window, dtype=torch.long))
    peaks = []
    for n in (24, 96):
        with LiveMemory() as memory:
            result = fit(base, expert, splits(n), options)
        peaks.append(memory.peak)
        width, layers, rows = base.head.width, len(base.head.blocks) + 3, options.batch_size * options.window
        batch = 4 * rows * width * layers
        factors = 8 * 12 * base.head.vocab_size * width  # fp64 copies of the head while factorising
        moments = 2 * result.closed.statistics.n_bytes + 1024 * 8 * width * layers  # rows that wait to be merged
        assert memory.peak < moments + 4 * batch + forward.peak + factors
        del result
    assert peaks[1] < 1.2 * peaks[0]  # four times the text, the same memory


def test_no_tensor_of_rows_by_vocabulary_on_the_path(models, tiny_lm, tiny_tokenizer):
    base, expert = models
    rows = 16 * 48
    with LiveMemory() as memory:
        fit(base, expert, splits(40), FitOptions(rank=4, window=48, batch_size=16, refine_steps=2))
    wide = [shape for shape in memory.shapes if len(shape) >= 2 and shape[-1] == base.head.vocab_size]
    assert not [shape for shape in wide if torch.Size(shape[:-1]).numel() > max(256, rows // 3)], wide


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 33}, "rank 33: expected 1..32"),
        ({"rank": 0}, "rank 0"),
        ({"columns": 301}, "301 columns: expected 1..300"),
        ({"alpha": -1.0}, "alpha -1.0"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"layers": (0, 9)}, r"layers \[9\]: this base has layers 0..3"),
        ({"positions": "first"}, "positions 'first'"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"window": 1}, "window 1"),
    ],
)
def test_bad_settings_are_refused_before_any_forward(models, options, message):
    base, _ = models

    def never(ids, mask):
        raise AssertionError("a forward pass ran before the settings were checked")

    with pytest.raises(ChassisError, match=message):
        fit(base, CallableExpert(never, base.head.vocab_size), splits(), FitOptions(**options))


def test_too_little_text_one_document_and_overlap_are_refused(models):
    base, expert = models
    with pytest.raises(ChassisError, match="no validation and no test documents .1 in all"):
        fit(base, expert, {"fit": documents(1)})
    with pytest.raises(ChassisError, match="rows to fit a map of width 32: expected at least 64"):
        fit(base, expert, splits() | {"fit": documents(1, length=8)})
    with pytest.raises(ChassisError, match="evaluation windows are also in the text"):
        fit(base, expert, splits() | {"test": splits()["fit"][:2]})


def test_expert_of_another_vocabulary_is_refused(models, tiny_lm):
    base, _ = models
    other = tiny_lm("llama", vocab_size=310)
    with pytest.raises(ChassisError, match="vocabulary of 310 tokens and the base 300"):
        fit(base, ModelExpert(other, inspect_head(other), "big"), splits())


def test_unwritable_output_is_refused_before_any_work(models, tmp_path):
    base, expert = models
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ChassisError, match="cannot write to"):
        fit(base, expert, splits(), out=blocked / "out")


def test_a_bfloat16_pair_is_fitted(tiny_lm, tiny_tokenizer):
    base, expert = pair(tiny_lm, tiny_tokenizer, dtype=torch.bfloat16)
    if base.readout.weight.dtype != torch.bfloat16:
        base = Base(base.model.bfloat16(), tiny_tokenizer)
        expert = ModelExpert(expert.model.bfloat16(), inspect_head(expert.model.bfloat16()), "expert")
    result = fit(base, expert, splits(), FitOptions(rank=8, window=48, refine_steps=5))
    scores = measure(base, expert, result)
    assert scores.adapters["refined|8"].kl < 0.9 * scores.no_op.kl


@pytest.mark.parametrize("kept", [0, 3, 100])
def test_refinement_reads_no_kept_batch_again(models, monkeypatch, kept):
    base, expert = models
    windows = make_windows(documents(24), base.tokenizer, length=24)[:20]
    probe, read = Probe(base.model, expert, (), "all", 4), []
    fresh = list(probe.batches(windows))
    monkeypatch.setattr(fit_module, "KEPT", sum(rows.nbytes for rows in fresh[:kept]))
    monkeypatch.setattr(fit_module, "ROWS_PER_STEP", 1)
    rows_of = expert.rows
    monkeypatch.setattr(expert, "rows", lambda ids, *rest: read.append(len(ids)) or rows_of(ids, *rest), raising=False)
    steps = list(itertools.islice(fit_module._steps(probe, windows), 3 * len(fresh)))
    assert len(read) == 3 * len(fresh) - 2 * min(kept, len(fresh))
    for number, rows in enumerate(steps):
        assert torch.equal(rows.expert, fresh[number % len(fresh)].expert)


def test_last_positions_only(models):
    base, expert = models
    many = splits(160)
    result = fit(base, expert, many, FitOptions(rank=4, window=48, positions="last", refine_steps=0))
    assert result.adapter.config.positions == "last"
    assert result.closed.statistics.n_rows == len(result.windows["fit"])
