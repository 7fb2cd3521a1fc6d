"""The benchmark harness: what it measures is registered once, right before it is timed, and reported in full."""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks import ceilings, measure, plots, run, tables, timing  # noqa: E402
from benchmarks.cases import LEVELS, OPS, cases, simple  # noqa: E402
from benchmarks.peers import PEERS, peers_of  # noqa: E402

RATES = {"matmul_fp32": 1e12, "matmul_bf16": 2e12, "copy": 1e10, "read": 1e10}
TINY = [case for op in OPS for case in cases(op, "tiny")]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    monkeypatch.setattr(measure, "ceilings", lambda device: RATES)
    monkeypatch.setattr(timing, "SHORTEST", 1e-5)
    monkeypatch.setattr(timing, "COPIES", 2)


@pytest.mark.parametrize("op", OPS)
def test_registry_has_every_op_at_every_level_without_repeats(op):
    for level in LEVELS:
        found = cases(op, level)
        keys = [(case.label, case.dtype) for case in found]
        assert found and len(set(keys)) == len(keys) and all(case.op == op for case in found)
        for case in found:
            assert {"eager", "chassis", "compile"} <= set(case.providers) and case.flops > 0 and case.bytes > 0


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="nothing"):
        cases("nothing", "tiny")
    with pytest.raises(ValueError, match="enormous"):
        cases("moments", "enormous")


@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.op} {case.label} {case.dtype}")
def test_every_provider_passes_the_gate(case):
    peers, _ = peers_of(case, "cpu")
    names = [name for name in case.providers | peers if name != "compile"]
    errors, limits, backends, failures = measure.gate(replace(case, providers=case.providers | peers), names, case.make(CPU))
    assert not failures and set(errors) == set(names) == set(limits)
    assert {name for name in names if name.startswith("chassis")} == set(backends)


def test_a_wrong_provider_is_rejected_and_not_timed():
    case = TINY[0]
    calls = []

    def wrong(x, y):
        calls.append(x)
        return x.T @ x, 1.001 * (x.T @ y)

    case = replace(case, providers=case.providers | {"wrong": simple(wrong)})
    rows = {row["provider"]: row for row in measure.measure(case, rounds=1, providers=("wrong", "chassis"))}
    assert rows["wrong"]["status"] == "failed" and rows["wrong"]["median_ms"] is None and len(calls) == 1
    assert "above" in rows["wrong"]["reason"] and rows["chassis"]["status"] == "ok"


@pytest.mark.parametrize("broken", [lambda x, y: 1 / 0, lambda x, y: (x.T @ x * torch.nan, x.T @ y)], ids=["raises", "nan"])
def test_a_broken_provider_is_a_row_with_its_reason(broken):
    case = replace(TINY[0], providers=TINY[0].providers | {"broken": simple(broken)})
    row = next(row for row in measure.measure(case, rounds=1, providers=("broken",)) if row["provider"] == "broken")
    assert row["status"] == "failed" and row["reason"] and row["median_ms"] is None


@pytest.mark.parametrize("provider, status", [("chassis_reused", 1), ("himalaya", 0)])
def test_only_a_failure_of_ours_fails_the_command(tmp_path, provider, status):
    case = replace(TINY[0], providers=TINY[0].providers | {provider: simple(lambda x, y: 1 / 0)})
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, measure.measure(case, rounds=1, providers=(provider,)))))
    assert run.main(["--rows", str(rows)]) == status


def test_rows_hold_all_fields_and_survive_json(tmp_path, capsys):
    out = tmp_path / "new" / "rows.jsonl"
    arguments = ["--op", "delta_logits", "--tiny", "--rounds", "2", "--providers", "chassis,eager_in_place"]
    assert run.main([*arguments, "--json", "--out", str(out), "--plot"]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [json.loads(line) for line in printed] == rows and len(rows) == 4 * 3
    for row in rows:
        assert list(row) == measure.FIELDS and row["status"] == "ok"
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["peak_bytes"] >= 0
        assert (row["backend"] is None) == (not row["provider"].startswith("chassis"))
        if row["provider"] == "eager":
            assert row["ratio_to_eager"] == row["ratio_p20"] == row["ratio_p80"] == 1
    names = {path.name for path in out.parent.glob("*.png")}
    assert names == {"rows-delta_logits-N.png", "rows-delta_logits-ratios.png", "rows-roofline.png"}
    assert run.main(["--op", "ridge", "--tiny", "--rounds", "1", "--providers", "chassis,himalaya"]) == 0
    assert "ridge" in capsys.readouterr().out


def test_the_script_runs_from_another_folder(tmp_path):
    shown = subprocess.run([sys.executable, ROOT / "benchmarks" / "run.py", "--help"], cwd=tmp_path, capture_output=True)
    assert shown.returncode == 0 and b"--quick" in shown.stdout


def test_a_peer_that_is_missing_or_does_not_apply_says_why(monkeypatch):
    case = cases("linear_kl", "tiny")[0]
    if importlib.util.find_spec("cut_cross_entropy"):
        assert peers_of(case, "cpu")[1]["cut-cross-entropy"] == "takes labels, not distributions"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    providers, reasons = peers_of(case, "cpu")
    assert not providers and set(reasons.values()) == {"is not installed"} and "liger-kernel" in reasons
    assert not any(peers_of(cases("delta_logits", "tiny")[0], "cpu")) and len(set(PEERS)) == len(PEERS)


def test_a_backend_of_a_gpu_is_a_provider_of_its_own(monkeypatch):
    case = cases("token_kl", "tiny")[0]
    for name in ("token_kl", "token_kl_", "token_kl_backward", "top_columns"):
        implementations = measure.OPS[name].implementations
        monkeypatch.setitem(implementations, "cuda", implementations["reference"])
    assert measure.with_backends(case.providers, "cpu") == case.providers
    providers = measure.with_backends(case.providers, "cuda")
    assert set(providers) - set(case.providers) >= {"chassis[cuda]", "chassis_reused[cuda]"}
    *_, failures = measure.gate(replace(case, providers=providers), ["eager", "chassis[cuda]"], case.make(CPU))
    status, reason = failures["chassis[cuda]"]
    assert status == "skipped" and "'cuda' was asked for" in reason


@pytest.mark.parametrize("op", ["projection_kl", "gold_kl", "token_kl"])
def test_a_loss_in_parts_is_the_loss(op):
    case = cases(op, "tiny", ("fp32",))[0]
    inputs = case.make(CPU)
    found, right = (case.providers[name].prepare(*inputs)() for name in ("chunked", "eager"))
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_readme_shows_what_the_rows_say(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    pattern = r"<!-- benchmarks/run.py (.*?) -->\n(.*?)<!-- end of rows -->"
    blocks = re.findall(pattern, (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for arguments, shown in blocks:
        assert run.main(arguments.split()) == 0
        assert capsys.readouterr().out == shown


def test_every_drop_in_of_the_readme_is_measured(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    section = (ROOT / "README.md").read_text().split("## Drop-ins")[1].split("<!-- ")[0]
    assert run.main(["--rows", "benchmarks/results/cpu.jsonl", "--drop-ins"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == [f"| {code}" for code in tables.DROP_INS]
    assert all(f"| {code} |" in section for code in tables.DROP_INS)


def test_of_rows_that_are_equal_the_last_counts(tmp_path, capsys):
    row = dict.fromkeys(measure.FIELDS) | {"op": "ridge", "shape": {"N": 1}, "dtype": "fp32", "provider": "chassis"}
    row |= {"status": "ok", "median_ms": 1.0, "ratio_to_eager": 1.0, "peak_bytes": 0}
    eager = row | {"provider": "eager"}
    files = [tmp_path / name for name in "ab"]
    files[0].write_text("".join(json.dumps(each) + "\n" for each in (eager, row)))
    files[1].write_text(json.dumps(row | {"ratio_to_eager": 7.0}) + "\n")
    assert run.main(["--rows", str(files[0]), "--rows", str(files[1]), "--table", "--out", str(files[0])]) == 0
    assert "| `ridge` | N=1 | 7.0 |" in capsys.readouterr().out
    assert len(files[0].read_text().splitlines()) == 2


def test_no_case_begins_after_the_minutes_are_over(capsys):
    assert list(run.rows_of(level="tiny", minutes=0)) == []
    assert "left out" in capsys.readouterr().err


def test_providers_take_turns_in_rotating_order():
    order = []
    steps = {name: [lambda name=name: order.append(name)] for name in "ab"}
    timing.SHORTEST, before = 0, timing.SHORTEST
    times = timing.rounds_of(steps, 2, CPU)
    timing.SHORTEST = before
    assert "".join(order[-4:]) == "abba" and all(len(each) == 2 for each in times.values())


def test_spread_and_paired_ratios():
    assert timing.spread([3.0]) == (3, 3, 3)
    assert timing.spread([1.0, 2, 3, 4, 5, 6]) == (3.5, 2, 5)
    assert timing.ratios([2.0, 9], [1.0, 3]) == [2, 3]


def test_peak_counts_what_is_alive_at_once():
    source = torch.ones(1 << 20)
    with timing.LiveBytes() as live:
        for _ in range(3):
            (source + 1).mul_(2)
    assert live.peak == source.nbytes
    assert source.nbytes <= timing.peak_bytes(lambda: source + 1, CPU) <= 2 * source.nbytes


def test_copies_are_independent_and_bounded():
    inputs = (torch.zeros(8), None)
    copies = timing.copies_of(inputs, CPU)
    assert len(copies) == 2 and copies[0] is inputs and copies[1][1] is None
    copies[1][0].fill_(1)
    assert inputs[0].sum() == 0


def test_the_ceiling_that_binds_is_named():
    assert ceilings.bound(2e12, 1e9, "fp32", RATES) == ("matmul_fp32", 2000)
    assert ceilings.bound(2e12, 1e11, "bf16", RATES) == ("copy", 10000)


def test_plots_of_nothing_are_none(tmp_path):
    assert plots.plot([], tmp_path / "rows.jsonl") == []


def test_a_size_is_drawn_though_another_size_equals_it(tmp_path):
    fixed = {"op": "delta_logits", "dtype": "fp32", "provider": "eager", "p20_ms": 1.0, "p80_ms": 1.0, "peak_bytes": 1}
    rows = [fixed | {"shape": {"N": n, "D": 64}, "median_ms": 1.0} for n in (1, 64)]
    assert plots._against(rows, "N", tmp_path / "rows.png") == [tmp_path / "rows.png"]
    assert plots._against(rows, "D", tmp_path / "rows.png") == []
