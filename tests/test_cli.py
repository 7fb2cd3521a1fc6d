"""The command line: one JSON object or tables, the library's own numbers, and one clear line for what goes wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chassis.adapter import Adapter
from chassis.cli import app
from chassis.experts import load_expert
from chassis.fit import Base, FitOptions, fit
from chassis.merge import merge
from chassis.models import load_causal_lm
from chassis.text.corpus import load_documents
from safetensors.torch import load_file, save_file
from support import documents, pair
from typer.testing import CliRunner

README = Path(__file__).parents[1] / "README.md"
FIT = ("--rank", "4", "--window", "48", "--batch-size", "4", "--refine-steps", "3")


@pytest.fixture(scope="module")
def work(tiny_lm, tiny_tokenizer, tmp_path_factory):
    """A folder with base, expert, text and an adapter fitted by the command line; `fit.json` is what that printed."""
    folder = tmp_path_factory.mktemp("work")
    base, expert = pair(tiny_lm, tiny_tokenizer)
    for name, model in (("base", base.model), ("expert", expert.model)):
        model.save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    for seed, name, count in ((1, "fit", 40), (2, "validation", 4), (3, "test", 4)):
        lines = [json.dumps({"text": document.text, "other": 1}) for document in documents(count, seed=seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    result = chassis("fit", *models(folder), *text(folder), *FIT, "-o", folder / "out", "--json")
    assert result.exit_code == 0, result.output
    (folder / "fit.json").write_text(result.stdout)
    return folder


def chassis(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def models(folder):
    return "--base", folder / "base", "--expert", folder / "expert"


def text(folder):
    return "--data", folder / "fit.jsonl", "--validation", folder / "validation.jsonl", "--test", folder / "test.jsonl"


def test_fit_prints_one_json_object_and_writes_everything(work):
    printed = (work / "fit.json").read_text()
    results = json.loads(printed)
    assert printed.count("\n") == 1 and results["rank"] == 4 and results["no_op"]["kl"] > 0
    written = {path.name for path in (work / "out").iterdir()}
    assert {"adapter.safetensors", "config.json", "lens", "report.html", "report.json", "kl_by_rank.png"} <= written
    assert json.loads((work / "out" / "report.json").read_text())["ranks"] == results["ranks"]


def test_fit_on_the_command_line_is_fit_in_python(work):
    model, tokenizer = load_causal_lm(work / "base")
    base = Base(model, tokenizer)
    expert = load_expert(str(work / "expert"), base.head, tokenizer)
    given = {name: list(load_documents(work / f"{name}.jsonl")) for name in ("fit", "validation", "test")}
    result = fit(base, expert, given, FitOptions(rank=4, window=48, batch_size=4, refine_steps=3))
    by_hand, saved = result.adapter.tensors(), Adapter.load(work / "out").tensors()
    assert all(torch.equal(by_hand[name], saved[name]) for name in by_hand)


def test_fit_for_people_shows_tables(work, tmp_path):
    result = chassis("fit", *models(work), *text(work), *FIT, "--no-refine", "--layers", "0,2", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    assert "Adapters by rank" in result.stdout and "4 closed form" in result.stdout and "refined" not in result.stdout
    assert "layer 2 of 3" in result.stdout and "layer 1 of 3" not in result.stdout
    assert "statistics" in result.stderr and "report.html" in result.stderr


def test_documents_without_splits_are_split_by_hash(work, tmp_path):
    command = ("fit", *models(work), "--data", work / "fit.jsonl", *FIT, "--no-refine", "--layers", "none", "--json")
    data = json.loads(chassis(*command, "-o", tmp_path).stdout)["data"]
    shares = [data[f"{split}_documents"] for split in ("fit", "validation", "test")]
    assert sum(shares) == 40 and shares[0] > 20 and min(shares) > 0


def test_sweep_reports_every_rank_and_saves_one(work, tmp_path):
    ranks = ("--ranks", "2,4,8", "--rank", "4", *FIT[2:], "--layers", "none")
    result = chassis("sweep", *models(work), *text(work), *ranks, "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {(r["rank"], r["kind"]) for r in found["ranks"]} == {
        (r, k) for r in (2, 4, 8) for k in ("closed form", "refined")
    }
    assert Adapter.load(tmp_path).rank == found["rank"] == 4
    one = {row["kind"]: row["kl"] for row in json.loads((work / "fit.json").read_text())["ranks"]}
    same = {row["kind"]: row["kl"] for row in found["ranks"] if row["rank"] == 4}
    assert same == pytest.approx(one, rel=1e-5)


def test_logit_bias_expert_by_strings(work, tmp_path):
    command = ("fit", "--base", work / "base", "--expert", "bias: the=4", *text(work), *FIT, "-o", tmp_path, "--json")
    results = json.loads(chassis(*command).stdout)
    best = min(row["kl"] for row in results["ranks"])
    assert results["expert"] == "bias: the=4" and best < 0.05 * results["no_op"]["kl"]


def test_eval_repeats_the_fit_s_numbers_and_refuses_its_text(work):
    command = ("eval", "--adapter", work / "out", "--expert", work / "expert", "--window", "48", "--json")
    found = json.loads(chassis(*command, "--data", work / "test.jsonl").stdout)
    fitted = json.loads((work / "fit.json").read_text())
    row = next(r for r in fitted["ranks"] if r["kind"] == ("refined" if fitted["refined"] else "closed form"))
    assert found["no_op"]["kl"] == pytest.approx(fitted["no_op"]["kl"], rel=1e-5)
    assert found["ranks"][0]["kl"] == pytest.approx(row["kl"], rel=1e-5)
    for name in ("base", "adapted", "expert"):
        assert found["bits_per_byte"][name] == pytest.approx(fitted["bits_per_byte"][name], rel=1e-5)
    refused = chassis(*command, "--data", work / "fit.jsonl")
    assert refused.exit_code == 2 and "were fitted on" in refused.stderr


def test_generate_speaks_side_by_side(work):
    command = ("generate", "--adapter", work / "out", "--prompt", "the quick", "--max-new-tokens", "8")
    rows = json.loads(chassis(*command, "--prompt", "def f", "--json").stdout)["generations"]
    assert [row["prompt"] for row in rows] == ["the quick", "def f"] and {"base", "adapted"} <= set(rows[0])
    shown = chassis(*command)
    assert shown.exit_code == 0 and "base" in shown.stdout and "adapted" in shown.stdout
    drawn = [chassis(*command, "--sample", "--seed", seed, "--json").stdout for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_generate_names_the_token_whose_logits_are_not_finite(work, tmp_path, tiny_tokenizer):
    shutil.copytree(work / "base", tmp_path / "base")
    weights = load_file(tmp_path / "base/model.safetensors")
    unread = torch.ones(len(tiny_tokenizer), dtype=torch.bool)
    unread[:32], unread[tiny_tokenizer("the quick")["input_ids"]] = False, False  # what loading looks at, and the prompt
    weights["model.embed_tokens.weight"][unread] = torch.nan
    save_file(weights, tmp_path / "base/model.safetensors", {"format": "pt"})
    command = ("generate", "--base", tmp_path / "base", "--adapter", work / "out", "--prompt", "the quick", "--sample")
    refused = chassis(*command, "--temperature", "9")
    assert refused.exit_code == 2 and "logits for token 2 after 'the quick' are NaN or infinite" in refused.stderr


def test_generate_with_several_experts_routes_each_prompt(work):
    plugs = ("--plug", f"one={work / 'out'}", "--plug", f"two={work / 'out'}")
    command = ("generate", *plugs, "--prompt", "the quick", "--prompt", "def f", "--max-new-tokens", "8")

    def rows(*routes):
        result = chassis(*command, *(part for route in routes for part in ("--route", route)), "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["generations"]

    alone = json.loads(chassis("generate", "--adapter", work / "out", *command[5:], "--json").stdout)["generations"]
    named, mixed, each = rows("one"), rows("one=0.25, two=0.75"), rows("two", "base")
    assert [row["adapted"] for row in named] == [row["adapted"] for row in mixed] == [row["adapted"] for row in alone]
    assert each[0]["adapted"] == alone[0]["adapted"] and each[1]["adapted"] == each[1]["base"]
    for row in rows():
        assert row["route"] == min(row["surprise"], key=row["surprise"].get)
    shown = chassis(*command, "--route", "one=0.5,two=0.5").stdout
    assert "one=0.5, two=0.5" in shown and "route" in shown
    for options, message in (
        (("--route", "three"), "no adapter 'three' is plugged"),
        (("--route", "one", "--route", "two", "--route", "one"), "3 routes for 2 prompts"),
        (("--plug", "one"), "expected name=folder"),
        (("--adapter", work / "out"), "give one --adapter folder, or --plug"),
    ):
        refused = chassis(*command, *options)
        assert refused.exit_code == 2 and message in refused.stderr


def test_merge_writes_the_merged_model(work, tmp_path):
    result = chassis("merge", "--adapter", work / "out", "-o", tmp_path / "merged", "--json")
    assert json.loads(result.stdout)["out"] == str(tmp_path / "merged")
    merged, _ = load_causal_lm(tmp_path / "merged")
    model, tokenizer = load_causal_lm(work / "base")
    merge(model, Adapter.load(work / "out"), tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), model.parameters(), strict=True))
    again = chassis("merge", "--adapter", work / "out", "-o", tmp_path / "merged")
    assert again.exit_code == 2 and "not empty" in again.stderr


def test_merge_writes_a_mixture(work, tmp_path):
    plugs = ("--plug", f"one={work / 'out'}", "--plug", f"two={work / 'out'}")
    assert chassis("merge", *plugs, "--route", "one=0.25,two=0.75", "-o", tmp_path / "half").exit_code == 0
    assert chassis("merge", "--adapter", work / "out", "-o", tmp_path / "whole").exit_code == 0
    half, whole = (load_causal_lm(tmp_path / name)[0] for name in ("half", "whole"))
    for a, b in zip(half.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for options, message in ((plugs, "give one --adapter"), ((*plugs, "--route", "three"), "no --plug named three")):
        refused = chassis("merge", *options, "-o", tmp_path / "x")
        assert refused.exit_code == 2 and message in refused.stderr


def test_export_writes_peft(work, tmp_path):
    result = chassis("export", "--adapter", work / "out", "--format", "peft", "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    folded = chassis("export", "--adapter", work / "out", "--bias", "fold", "-o", tmp_path / "folded", "--json")
    assert "rank 5" in json.loads(folded.stdout)["notices"][0]
    padded = chassis("export", "--adapter", work / "out", "--pad", "-o", tmp_path / "padded", "--json")
    assert padded.exit_code == 0 and json.loads((tmp_path / "padded" / "adapter_config.json").read_text())["r"] == 8
    back = chassis("import", "--peft", tmp_path, "--base", work / "base", "-o", tmp_path / "back", "--json")
    assert back.exit_code == 0 and Adapter.load(tmp_path / "back").rank == 4


def test_errors_are_one_line_and_one_object(work, tmp_path):
    command = ("fit", "--base", tmp_path / "none", "--expert", work / "expert", *text(work), "-o", tmp_path)
    result = chassis(*command, "--json")
    assert result.exit_code == 2 and "no such folder" in json.loads(result.stdout)["error"]
    lines = [line for line in result.stderr.splitlines() if not line.startswith("read ")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in result.stderr
    assert isinstance(chassis(*command, "--debug").exception, ValueError)


BAD = {
    "missing model": (["--base", "{tmp}/none"], "no such folder"),
    "missing expert": (["--expert", "{tmp}/none"], "no such folder"),
    "missing text": (["--data", "{tmp}/none.txt"], "no such file"),
    "text column absent": (["--text-column", "content"], "no text column 'content'"),
    "empty file": (["--data", "{tmp}/empty.txt"], "empty"),
    "overlap": (["--test", "{work}/fit.jsonl"], "windows are also in the text"),
    "output under a file": (["-o", "{tmp}/empty.txt/out"], "cannot write"),
    "rank": (["--rank", "33"], "rank 33: expected 1..32"),
    "columns": (["--columns", "100000"], "columns: expected 1.."),
    "alpha": (["--alpha", "-1"], "alpha -1"),
    "layers": (["--layers", "0,9"], "layers [9]"),
    "layers by name": (["--layers", "some"], "layers 'some': expected all, none or numbers"),
    "positions": (["--positions", "first"], "positions 'first'"),
    "dtype": (["--dtype", "int8"], "dtype 'int8'"),
    "device": (["--device", "nowhere"], "device 'nowhere'"),
    "bias expert": (["--expert", "bias:the"], "expected bias:"),
    "batch size": (["--batch-size", "0"], "Invalid value"),
    "tokens": (["--max-tokens", "0"], "Invalid value"),
    "a model's folder": (["-o", "{work}/base"], "config.json of something else"),
    "truncated weights": (["--base", "{tmp}/truncated"], "damaged or truncated weights"),
    "NaN in the weights": (["--base", "{tmp}/nan"], "its logits are NaN or infinite"),
}


def put_nan(path):
    tensors = load_file(path)
    next(tensor for tensor in tensors.values() if tensor.ndim == 2)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


damage = {"truncated": lambda path: os.truncate(path, path.stat().st_size // 2), "nan": put_nan}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(work, tmp_path, case):
    changes, message = BAD[case]
    (tmp_path / "empty.txt").write_text("")
    changes = [value.format(tmp=tmp_path, work=work) for value in changes]
    for name in ("truncated", "nan"):
        if str(tmp_path / name) in changes:
            damage[name](shutil.copytree(work / "base", tmp_path / name) / "model.safetensors")
    given = dict(zip((*models(work), *text(work))[::2], (*models(work), *text(work))[1::2], strict=True))
    given |= {"-o": tmp_path / "out"} | dict(zip(changes[::2], changes[1::2], strict=True))
    result = chassis("fit", *(part for pair in given.items() for part in pair), "--window", "48")
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not (tmp_path / "out" / "adapter.safetensors").exists()


def test_one_document_is_too_little(work, tmp_path):
    (tmp_path / "one.txt").write_text("def f(x):\n    return x\n" * 50)
    result = chassis("fit", *models(work), "--data", tmp_path / "one.txt", "-o", tmp_path / "out")
    assert result.exit_code == 2 and "documents (1 in all)" in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_refused_before_any_work(work, tmp_path):
    tmp_path.chmod(0o500)
    result = chassis("fit", *models(work), *text(work), "-o", tmp_path / "out")
    assert result.exit_code == 2 and "cannot write" in result.stderr


def test_adapter_of_another_base_is_refused(work, tmp_path):
    shutil.copytree(work / "out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"vocabulary_hash": "0" * 64}))
    result = chassis("generate", "--adapter", tmp_path / "out", "--prompt", "a")
    assert result.exit_code == 2 and "vocabulary" in result.stderr
    for options in (["--adapter", tmp_path], ["--adapter", work / "out", "--temperature", "0"]):
        assert chassis("generate", "--prompt", "a", *options).exit_code == 2
    assert chassis("export", "--adapter", work / "out", "--format", "onnx", "-o", tmp_path / "x").exit_code == 2


def test_an_adapter_of_nan_is_refused(work, tmp_path):
    put_nan(shutil.copytree(work / "out", tmp_path / "out") / "adapter.safetensors")
    for command in (("eval", "--data", work / "test.jsonl", "--expert", work / "expert"), ("generate", "--prompt", "a")):
        result = chassis(*command, "--adapter", tmp_path / "out")
        assert result.exit_code == 2 and "NaN" in result.stderr


def test_what_is_not_ours_is_not_written_over(work, tmp_path):
    assert chassis("lens", "fit", "--base", work / "base", *text(work)[:2], "-o", tmp_path / "lens").exit_code == 0
    assert (
        chassis("lens", "export", "--lens", tmp_path / "lens", "--format", "tuned-lens", "-o", tmp_path / "tuned").exit_code
        == 0
    )
    assert chassis("export", "--adapter", work / "out", "-o", tmp_path / "lora").exit_code == 0
    model = shutil.copytree(work / "base", tmp_path / "model")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    for command in (
        ("lens", "fit", "--base", work / "base", *text(work)[:2]),
        ("lens", "import", "--from", tmp_path / "tuned", "--format", "tuned-lens"),
        ("lens", "export", "--lens", tmp_path / "lens", "--format", "tuned-lens"),
        ("import", "--peft", tmp_path / "lora", "--base", work / "base"),
    ):
        result = chassis(*command, "-o", model)
        assert result.exit_code == 2 and "config.json of something else" in result.stderr, command
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert (
        chassis("lens", "fit", "--base", work / "base", *text(work)[:2], "-o", tmp_path / "lens").exit_code == 0
    )  # its own


def test_an_adapter_finds_its_base_from_anywhere(work, tmp_path, monkeypatch):
    monkeypatch.chdir(work)
    fitted = chassis("fit", "--base", "base", "--expert", "expert", *text(work), *FIT, "--no-refine", "-o", tmp_path / "out")
    assert fitted.exit_code == 0, fitted.output
    monkeypatch.chdir(tmp_path)
    spoken = chassis("generate", "--adapter", "out", "--prompt", "the quick", "--max-new-tokens", "2")
    shown = chassis("lens", "show", "--lens", "out", "--text", "the quick")
    assert spoken.exit_code == shown.exit_code == 0, spoken.output + shown.output


def test_an_unreachable_hub_is_said_so(work, tmp_path):
    """Model and dataset each in a process of their own: whether the hub is reached is decided at import."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    program = [sys.executable, "-c", "from chassis.cli import main; main()", "fit", "-o", str(tmp_path / "out")]
    expert = ["--expert", str(work / "expert")]
    cases = {
        "owner/model: cannot be loaded": ["--base", "owner/model", "--data", str(work / "fit.jsonl")],
        "hf://owner/data: cannot read": ["--base", str(work / "base"), "--data", "hf://owner/data"],
    }
    running = {
        message: subprocess.Popen([*program, *expert, *options], env=os.environ | offline, stderr=subprocess.PIPE, text=True)
        for message, options in cases.items()
    }
    for message, process in running.items():
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 2 and message in stderr and "Traceback" not in stderr, stderr


def test_an_interrupted_fit_says_how_to_go_on(work, tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("chassis.fit.fit", stop)
    result = chassis("fit", *models(work), *text(work), *FIT, "-o", tmp_path)
    assert result.exit_code == 130 and "goes on" in result.stderr
    monkeypatch.setattr("chassis.doctor.examine", stop)
    result = chassis("doctor")
    assert result.exit_code == 130 and result.stderr == "interrupted\n"


def test_readme_s_python_runs(work, tmp_path, monkeypatch, capsys):
    """The main job, then several experts on its base."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[:2])
    for name in ("base", "expert"):
        code = code.replace(f'"owner/{name}"', repr(str(work / name)))
    for given, ours in {
        '"texts.jsonl"': repr(str(work / "fit.jsonl")),
        "rank=32": "rank=4, window=48, refine_steps=2",
        '"out1"': '"out"',
        '"out2"': '"out"',
    }.items():
        assert given in code
        code = code.replace(given, ours)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "out" / "report.html").exists() and capsys.readouterr().out


def test_align_shows_the_chunks_of_two_tokenizers(work, tmp_path):
    from chassis.testbed.tokenizers import sentencepiece_style

    sentencepiece_style(["the quick brown fox jumps over the lazy dog " * 3] * 4, 330).save_pretrained(tmp_path)
    result = chassis("align", work / "base", tmp_path, "--text", "the fox", "--text", "é", "--json")
    first, second = json.loads(result.stdout)["samples"]
    assert first["valid"].count(True) == 2 == first["correct"].count(True)
    assert "".join(item["token"] for item in first["teacher"]) == "<s>▁the▁fox"
    assert [item["chunk"] for item in second["student"]] == [1, 1] and second["correct"] == [False, True]
    shown = chassis("align", work / "base", tmp_path, "--text", "the fox")
    assert "2 of 3 chunks are spelled alike by both" in shown.stdout
    assert "▁the │ ▁fox" in shown.stdout and "≠" in shown.stdout
    for arguments, message in (
        ((work / "base", tmp_path), "give --text or --file"),
        ((work / "base", tmp_path / "no", "--text", "a"), "no such folder"),
        ((work / "base", tmp_path, "--file", tmp_path / "no.txt"), "cannot be read as UTF-8 text"),
    ):
        assert message in chassis("align", *arguments).stderr
