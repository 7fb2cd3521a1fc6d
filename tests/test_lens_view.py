"""The lens viewer and other libraries' lens layouts: numbers from their definitions, round trips, a page in a browser."""

import json
import os
import re
import shutil
import subprocess

import pytest
import torch
from chassis.cli import app
from chassis.errors import ChassisError
from chassis.experts import ModelExpert
from chassis.lens import Lens, LensConfig, fit_self_lens
from chassis.lens_formats import export_jacobian, export_tuned, import_jacobian, import_tuned
from chassis.lens_view import view, write_view
from chassis.models import capture, inspect_head
from chassis.probes import make_windows
from support import documents, pair
from typer.testing import CliRunner

TEXT = "the quick <b>brown</b> fox\n    return x"


@pytest.fixture(scope="module")
def base(tiny_lm, tiny_tokenizer):
    return pair(tiny_lm, tiny_tokenizer)[0]


@pytest.fixture(scope="module")
def windows(tiny_tokenizer):
    return make_windows(documents(20), tiny_tokenizer, length=48)


@pytest.fixture(scope="module")
def lens(base, windows):
    return fit_self_lens(base.model, windows, 1e-6, LensConfig("base", "base"))


def test_a_self_lens_is_ridge_onto_the_residual_before_the_norm(base, windows, lens):
    rows = [capture(base.model, torch.tensor(w.ids)[None].long(), layers=(1, 3), pre_norm=True) for w in windows]
    x = torch.cat([row.layers[1][0] for row in rows]).double()
    y = torch.cat([row.pre_norm[0] for row in rows]).double()
    best = y - y.mean(0) - (x - x.mean(0)) @ torch.linalg.lstsq(x - x.mean(0), y - y.mean(0)).solution
    found = y - lens.hidden(1, x.float()).double()
    assert found.square().sum() <= 1.001 * best.square().sum()
    assert lens.layers == [0, 1, 2] and lens.config.n_windows == len(windows)
    assert torch.equal(torch.cat([row.layers[3][0] for row in rows]).double(), y)


def test_the_logit_lens_s_numbers_are_what_they_say(base):
    results = view(base, TEXT)
    ids = base.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = base.model(ids, output_hidden_states=True)
        last = out.logits[0].log_softmax(-1)
        for layer, row in enumerate(results["layers"][:-1]):
            mine = base.head.logits(base.head.final_norm(out.hidden_states[layer]))[0].log_softmax(-1)
            for position, cell in enumerate(row["cells"]):
                kl = (last.exp() * (last - mine)).sum(-1)[position].item()
                assert cell["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-5)
                assert cell["entropy"] == pytest.approx(-(mine.exp() * mine).sum(-1)[position].item(), rel=1e-4)
                assert cell["top"][0]["p"] == pytest.approx(mine[position].exp().max().item(), rel=1e-4)
    said = results["layers"][-1]
    assert said["mean_kl"] == 0 and said["agree"] == 1 and "".join(results["tokens"]) == TEXT
    assert len(results["layers"]) == base.head.n_layers + 1


def test_a_lens_is_nearer_to_the_end_than_no_lens(base, lens):
    plain, seen = (view(base, documents(1, seed=9)[0].text, each) for each in (None, lens))
    assert all(b["mean_kl"] < a["mean_kl"] for a, b in zip(plain["layers"][:-1], seen["layers"][:-1], strict=True))


def test_a_lens_to_an_expert_ends_in_what_the_expert_says(tiny_lm, tiny_tokenizer, base):
    expert = tiny_lm("llama", seed=1, tie_word_embeddings=False)
    expert = ModelExpert(expert, inspect_head(expert), "expert")
    identity = Lens({l: (torch.eye(32), torch.zeros(32)) for l in (1, "final")}, LensConfig("base", "expert"))
    results = view(base, TEXT, identity, expert)
    ids = tiny_tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        top = expert.model(ids).logits[0].softmax(-1).max(-1).values.tolist()
    assert [cell["top"][0]["p"] for cell in results["layers"][-1]["cells"]] == pytest.approx(top, rel=1e-4)
    assert [row["layer"] for row in results["layers"]] == [1, "final", "end"]
    with pytest.raises(ChassisError, match="leads to 'expert': give that expert too"):
        view(base, TEXT, identity)


def test_the_tuned_lens_layout_goes_out_and_comes_back(base, lens, tmp_path):
    """Read as its library does: h + translator(h), translator a Linear with these parameters."""
    assert export_tuned(lens, tmp_path) == []
    state = torch.load(tmp_path / "params.pt", weights_only=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 3 and config["lens_type"] == "linear_tuned_lens" and config["d_model"] == 32
    translators = torch.nn.ModuleList([torch.nn.Linear(32, 32) for _ in range(3)])
    translators.load_state_dict(state)
    again, h = import_tuned(tmp_path), torch.randn(5, 32)
    for layer in range(3):
        theirs = h + translators[layer](h)
        torch.testing.assert_close(theirs, lens.hidden(layer, h), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again.hidden(layer, h), lens.hidden(layer, h), rtol=1e-4, atol=1e-4)
    assert again.config.target == "pre_norm" and view(base, TEXT, again)["layers"][0]["layer"] == 0


def test_the_jacobian_lens_layout_goes_out_and_comes_back(base, lens, tmp_path):
    """J[l] transports the output of block l, the input of block l + 1, without an intercept."""
    notices = export_jacobian(lens, tmp_path)
    assert len(notices) == 2 and "no intercept" in notices[1]
    content = torch.load(tmp_path / "lens.pt", weights_only=True)
    assert content["source_layers"] == [0, 1] and content["d_model"] == 32 and content["n_prompts"] == lens.config.n_windows
    again, h = import_jacobian(tmp_path, base="base"), torch.randn(5, 32)
    for layer in (1, 2):
        without = h @ lens.maps[layer][0]
        torch.testing.assert_close(h @ content["J"][layer - 1].T, without, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again.hidden(layer, h), without, rtol=1e-5, atol=1e-5)
    assert again.layers == [1, 2] and again.config.n_windows == lens.config.n_windows
    saved = Lens.load(again.save(tmp_path / "saved"))
    assert saved.config == again.config and saved.layers == again.layers


def test_what_a_layout_cannot_hold_or_a_file_is_not_is_said(base, lens, tmp_path):
    to_expert = Lens(lens.maps, LensConfig("base", "expert"))
    for export in (export_tuned, export_jacobian):
        with pytest.raises(ChassisError, match="chassis lens fit"):
            export(to_expert, tmp_path / "x")
    some = Lens({1: lens.maps[1]}, lens.config)
    with pytest.raises(ChassisError, match=r"no lens for layers \[0, 2\]"):
        export_tuned(some, tmp_path / "x")
    with pytest.raises(ChassisError, match="holds no tuned lens"):
        import_tuned(tmp_path)
    (tmp_path / "lens.pt").write_bytes(b"junk")
    with pytest.raises(ChassisError, match="cannot be read"):
        import_jacobian(tmp_path)
    torch.save({"vectors": 1}, tmp_path / "lens.pt")
    with pytest.raises(ChassisError, match="no Jacobian lens: expected 'J'"):
        import_jacobian(tmp_path)
    torch.save({"J": os.system}, tmp_path / "lens.pt")  # would run code if it were simply unpickled
    with pytest.raises(ChassisError, match="cannot be read"):
        import_jacobian(tmp_path)
    with pytest.raises(ChassisError, match="the text has no tokens"):
        view(base, "")
    with pytest.raises(ChassisError, match=r"layers \[7\], base only 0..3"):
        view(base, TEXT, Lens({7: lens.maps[1]}, lens.config))


def test_chromium_shows_the_page_as_it_was_written(base, lens, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs chromium")
    page = write_view(view(base, TEXT, lens), tmp_path)
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --hide-scrollbars --window-size=1200,900"
    command = [chromium, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    tokens = json.loads((tmp_path / "lens.json").read_text())["tokens"]
    assert shown.stdout.count("<td style=") == 4 * len(tokens), shown.stderr[-2000:]
    assert "&lt;" in shown.stdout and "⏎" in shown.stdout and "fox" in shown.stdout
    assert not re.search(r"(src|href)=\"(?!data:)", page.read_text()) and "<b>brown" not in page.read_text()
    picture = tmp_path / "page.png"
    subprocess.run([*command, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=120)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000


def test_the_commands_fit_show_and_exchange_a_lens(base, tmp_path):
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": d.text}) for d in documents(20)))

    def run(*arguments, code=0):
        result = CliRunner().invoke(app, ["lens", *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result

    run("fit", "--base", tmp_path / "base", "--data", tmp_path / "text.jsonl", "--window", 48, "-o", tmp_path / "lens")
    shown = run("show", "--lens", tmp_path / "lens", "--text", TEXT, "-o", tmp_path / "page").stdout
    assert "block 1 of 3" in shown and "said" in shown and (tmp_path / "page" / "lens.html").exists()
    for form in ("tuned-lens", "jacobian"):
        run("export", "--lens", tmp_path / "lens", "--format", form, "-o", tmp_path / form)
        run(
            "import", "--from", tmp_path / form, "--format", form, "--base", tmp_path / "base", "-o", tmp_path / f"{form}-in"
        )
        read = json.loads(run("show", "--lens", tmp_path / f"{form}-in", "--text", TEXT, "--json").stdout)
        assert len(read["layers"]) == (4 if form == "tuned-lens" else 3)
    assert (
        "expected tuned-lens or jacobian"
        in run("import", "--from", tmp_path, "--format", "x", "-o", tmp_path, code=2).stderr
    )
    assert "give --lens" in run("show", "--text", TEXT, code=2).stderr
    run("import", "--from", tmp_path / "jacobian", "--format", "jacobian", "-o", tmp_path / "unnamed")
    assert "which model it is of" in run("show", "--lens", tmp_path / "unnamed", "--text", TEXT, code=2).stderr
    alone = json.loads(run("show", "--base", tmp_path / "base", "--text", TEXT, "--json", "--max-tokens", 3).stdout)
    assert alone["lens"] == "logit lens" and len(alone["tokens"]) == 3
