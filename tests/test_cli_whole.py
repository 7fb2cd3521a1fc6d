"""The command line as a whole: doctor, bench, help, the README's commands and the demo."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from chassis.fit import FitOptions
from test_cli import README, chassis


def test_doctor_lists_every_op_and_is_strict_when_asked(monkeypatch):
    findings = json.loads(chassis("doctor", "--json").stdout)
    pairs = {(row["op"], row["backend"]) for row in findings["capabilities"]}
    assert {(op, "reference") for op in ("moments_update_", "delta_logits_", "linear_kl")} <= pairs
    assert findings["environment"]["torch"] == torch.__version__ and chassis("doctor").exit_code == 0
    monkeypatch.setattr("chassis.doctor.examine", lambda: findings | {"hints": ["something is missing"]})
    assert chassis("doctor").exit_code == 0 and chassis("doctor", "--strict").exit_code == 1
    shown = chassis("doctor").stdout
    assert "something is missing" in shown
    table = shown[shown.index("Ops by backend") :].splitlines()
    assert {op for op, _ in pairs} <= {line.split()[0] for line in table if line.strip()}


def test_bench_times_what_it_has_checked(monkeypatch):
    rows = json.loads(chassis("bench", "delta_logits", "--rounds", "1", "--json").stdout)["rows"]
    assert {row["op"] for row in rows} == {"delta_logits"} and all(row["median_ms"] > 0 for row in rows)
    assert chassis("bench", "nothing").exit_code == 2
    monkeypatch.setattr("benchmarks.ops.delta_logits.delta_logits_", lambda logits, *_, cols: logits.fill_(1))
    assert chassis("bench", "delta_logits", "--rounds", "1").exit_code == 2
    monkeypatch.setattr("chassis.bench.ROOT", Path("/nonexistent"))
    assert chassis("bench").exit_code == 2


def test_help_needs_no_torch():
    program = (
        "import sys, chassis.cli; sys.exit(bool({'torch', 'transformers', 'matplotlib', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    for name in ("fit", "sweep", "demo", "eval", "generate", "merge", "export", "doctor", "bench"):
        assert name in chassis("--help").stdout and "--json" in chassis(name, "--help").stdout


def test_readme_s_commands_exist():
    lines = [line for line in README.read_text().splitlines() if line.startswith("chassis ")]
    assert len(lines) >= 6
    for _, name, *options in map(str.split, lines):
        command = (name, options[0]) if name in ("bridge", "lens") else (name,)
        helped = chassis(*command, "--help").stdout
        assert all(option in helped for option in options if option.startswith("-")), lines


def test_demo_runs_on_any_testbed(tiny_testbed, tmp_path, monkeypatch):
    options = FitOptions(rank=4, ranks=(2,), window=64, max_windows=40, max_test_windows=8, refine_steps=2)
    monkeypatch.setattr("chassis.demo.run_demo.__defaults__", (None, options))
    monkeypatch.setattr("chassis.testbed.build", lambda: tiny_testbed)
    result = chassis("demo", "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["generations"] and (tmp_path / "report.html").exists() and found["ranks"][0]["rank"] == 2
    assert set(found["port"]["nats"]["prose"]) == {"base", "code", "bridged", "half of each", "auto"}
    assert found["port"]["generations"][2]["route"] == {"code": 0.5, "bridged": 0.5}
