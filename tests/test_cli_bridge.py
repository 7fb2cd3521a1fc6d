"""`chassis bridge` and `chassis fit --bridge` as a user types them."""

import json

import pytest
from chassis.cli import app
from chassis.errors import BridgeError
from typer.testing import CliRunner


def chassis(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def work(tiny_testbed, tmp_path_factory):
    """Text in three files, a few kilobytes each; enough to count on."""
    folder = tmp_path_factory.mktemp("bridge")
    for split, count in (("fit", 8), ("validation", 2), ("test", 2)):
        texts = [d.text[:4000] for d in tiny_testbed.documents["source"][split][:count]]
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


def text(work):
    return "--data", work / "fit.jsonl", "--validation", work / "validation.jsonl", "--test", work / "test.jsonl"


def test_build_writes_a_bridge_and_says_what_is_shared(tiny_testbed, work, tmp_path):
    out = tmp_path / "b.safetensors"
    result = chassis(
        "bridge", "build", tiny_testbed.base, tiny_testbed.other_expert, "--data", work / "fit.jsonl", "-o", out, "--json"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["coverage"]["method"] == "counted" and found["coverage"]["unmapped_tokens"] == 0 and out.exists()
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG") and found["heat_map"] == str(tmp_path / "b.png")
    shown = chassis("bridge", "build", tiny_testbed.base, tiny_testbed.other_expert, "--method", "exact", "-o", out)
    assert "What the vocabularies share" in shown.stdout and "equal bytes" in shown.stdout and "Some rows" in shown.stdout


def test_build_em_runs_the_expert_and_the_bridge_is_read_by_eval(tiny_testbed, work, tmp_path):
    out = tmp_path / "em.safetensors"
    pair = tiny_testbed.base, tiny_testbed.other_expert
    options = "--method", "em", "--data", work / "fit.jsonl", "--positions", 150, "-o", out, "--json"
    result = chassis("bridge", "build", *pair, *options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["coverage"]["method"] == "em"
    models = "--base", tiny_testbed.base, "--expert", tiny_testbed.other_expert, "--bridge", out
    result = chassis("bridge", "eval", *models, *text(work), "--max-windows", 1, "--window", 32, "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    assert rows["em"]["bits_per_byte"] < rows["canonical"]["bits_per_byte"] and rows["jeffrey"]["bits_per_byte"] > 0


@pytest.mark.parametrize("method", ["projection", "counted-projection", "embedding-projection"])
def test_build_writes_projections_with_sample_rows(tiny_testbed, work, tmp_path, method):
    out = tmp_path / "p.safetensors"
    result = chassis(
        *("bridge", "build", tiny_testbed.base, tiny_testbed.other_expert),
        *("--method", method, "--data", work / "fit.jsonl", "-o", out),
    )
    assert result.exit_code == 0, result.output
    assert "Some rows" in result.stdout and "empty rows" in result.stdout and out.exists()


def test_eval_prints_the_ladder_and_writes_the_page(tiny_testbed, work, tmp_path):
    models = "--base", tiny_testbed.base, "--expert", tiny_testbed.other_expert
    result = chassis(
        *("bridge", "eval", *models, *text(work), "--max-windows", 3, "--window", 48),
        *("--lookahead", "2", "--reference", "4", "--semantic", "--em", 100, "-o", tmp_path, "--json"),
    )
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    assert {"counted", "counted, no mask", "canonical", "exact", "lookahead 2", "base alone"} <= set(rows)
    assert {"exact, by decode", "two_segment, by decode", "jeffrey", "jeffrey_counted", "em"} <= set(rows)
    assert {"semantic: ridge", "semantic: hidden_ridge", "counted + hidden_ridge"} <= set(rows)
    assert "uncertainty" not in rows["semantic: ridge"] and rows["semantic: ridge"]["unmapped"] == 0
    assert rows["counted"]["kl_bits"] < rows["canonical"]["kl_bits"] and rows["base alone"]["kl_bits"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"bridge.html", "bridge.json", "ladder.png"}
    page = (tmp_path / "bridge.html").read_text()
    for part in ("Uncertainty of the bridge", "Surprise of the expert in its own tokens", "Surprise of the base", "no-op"):
        assert part in page
    assert "3 windows" in page and "<script" not in page


@pytest.mark.parametrize("init", ["both", "newton", "semantic"])
def test_fit_through_a_bridge(tiny_testbed, work, tmp_path, init):
    models = "--base", tiny_testbed.base, "--expert", tiny_testbed.other_expert, "--init", init
    options = "--rank", 4, "--window", 48, "--batch-size", 4, "--refine-steps", 3, "--max-test-tokens", 400
    result = chassis("fit", *models, "--bridge", "auto", *text(work), *options, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert "starts from" in result.stderr and ("semantic" in result.stderr) >= (init == "semantic")
    assert found["seconds"]["plain_forward"] > 0 and "in plain forwards" in (tmp_path / "out/report.html").read_text()
    assert found["no_op"]["kl"] > 0 and found["ranks"] and (tmp_path / "out/adapter.safetensors").exists()
    spoken = chassis("generate", "--adapter", tmp_path / "out", "--prompt", "def f(", "--max-new-tokens", 4)
    assert spoken.exit_code == 0, spoken.output


def test_vocabularies_that_share_too_little_leave_the_step_alone(tiny_testbed, work, tmp_path, monkeypatch):
    def refuse(*_):
        raise BridgeError("3 tokens of equal bytes")

    monkeypatch.setattr("chassis.bridge.expert.semantic_change", refuse)
    models = "--base", tiny_testbed.base, "--expert", tiny_testbed.other_expert, "--bridge", "auto"
    options = (
        "--rank",
        4,
        "--window",
        48,
        "--max-tokens",
        800,
        "--no-refine",
        "--max-test-tokens",
        100,
        "-o",
        tmp_path / "out",
    )
    result = chassis("fit", *models, *text(work), *options)
    assert result.exit_code == 0 and "of the semantic" not in result.stderr and "of the Gauss-Newton step" in result.stderr
    result = chassis("fit", *models, *text(work), *options, "--init", "semantic")
    assert result.exit_code == 2 and "3 tokens of equal bytes" in result.stderr


def test_an_ensemble_speaks_with_and_without_lookahead(tiny_testbed, work):
    models = "--base", tiny_testbed.base, "--expert", tiny_testbed.other_expert, "--data", work / "fit.jsonl"
    options = "--prompt", "def f(x):\n", "--max-new-tokens", 5, "--json"
    for extra in ((), ("--lookahead", 2), ("--sample", "--mix", 0.5)):
        result = chassis("ensemble", *models, *options, *extra)
        assert result.exit_code == 0, result.output
        (row,) = json.loads(result.stdout)["generations"]
        assert row["base"] and row["expert"] and row["both"]


def test_an_ensemble_of_the_base_alone_is_the_base(tiny_testbed, work):
    import torch
    from chassis.bridge.ensemble import next_distribution
    from chassis.bridge.loading import Side, bridge_for
    from chassis.models import load_causal_lm

    base, expert = (Side(*load_causal_lm(f), f.name) for f in (tiny_testbed.base, tiny_testbed.other_expert))
    texts = [json.loads(line)["text"] for line in (work / "fit.jsonl").read_text().splitlines()]
    text = "import os\nfor x in"
    q, p = next_distribution(base, expert, bridge_for(base, expert, "auto", texts), text)
    ids = torch.tensor([[base.tokens.roles["bos"], *base.tokens.encode(text).ids]])
    with torch.no_grad():
        expected = base.model(input_ids=ids).logits[0, -1].double().softmax(-1)
    torch.testing.assert_close(p, expected, atol=1e-6, rtol=1e-4)
    assert q.sum() == pytest.approx(1, abs=1e-5) and (q >= 0).all()
    asking = next_distribution(base, expert, bridge_for(base, expert, "auto", texts).asking_base(), text)[0]
    assert asking.sum() == pytest.approx(1, abs=1e-5) and (asking - q).abs().sum() > 1e-3


def test_bad_requests_are_refused(tiny_testbed, work, tmp_path):
    pair = tiny_testbed.base, tiny_testbed.other_expert
    for arguments, message in (
        (("bridge", "build", *pair), "needs text to count on"),
        (("bridge", "build", *pair, "--method", "em"), "method em needs text to count on"),
        (("ensemble", "--base", pair[0], "--expert", pair[1], "--prompt", "a"), "needs text to count on"),
        (
            ("ensemble", "--base", pair[0], "--expert", pair[1], "--data", work / "fit.jsonl", "--prompt", "a", "--mix", 2),
            "expected 0 (the expert alone) to 1",
        ),
        (("bridge", "build", *pair, "--method", "magic"), "method 'magic'"),
        (("bridge", "build", *pair, "--method", "exact", "-o", tmp_path / "b.png"), "are .safetensors files"),
        (("bridge", "build", tmp_path / "no", pair[1], "--method", "exact"), "no such folder"),
        (("fit", "--base", pair[0], "--expert", pair[1], *text(work)), "different vocabularies"),
        (("fit", "--base", pair[0], "--expert", pair[1], *text(work), "--init", "newton"), "is for a fit through a bridge"),
        (("fit", "--base", pair[0], "--expert", pair[1], "--bridge", tmp_path / "no.st", *text(work)), "no such bridge"),
    ):
        result = chassis(*arguments)
        assert result.exit_code == 2 and message in result.stderr, result.output
