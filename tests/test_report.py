"""The report: complete, self-contained, escaped, readable in a terminal, and able to do without any of its parts."""

import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
from chassis.errors import ChassisError
from chassis.page import plain
from chassis.report import print_report, tables, write_report
from matplotlib import image
from rich.console import Console

NASTY = '</pre><script>alert("1")</script> & [red]markup[/red] \x1b[31m\x00'
NO_OP = 0.625


def example(**changes) -> dict:
    """Results such as `chassis.results.summarise` gives, with figures of a plausible size."""
    curves = {"closed form": {4: 0.431, 8: 0.384, 32: 0.277}, "refined": {4: 0.330, 8: 0.280, 32: 0.188}}
    score = {"stderr": 0.006, "top1": 0.7}
    share = {"bits_per_byte": 2.3, "gap_closed": 0.55, "parameters": 70400, "bytes": 281600, "columns": None}
    tokens = [{"text": f"word{i}" + "\n" * (i % 3 == 0), "no_op_kl": 0.1 * i, "kl": 0.05 * i} for i in range(12)]
    results = {
        "title": "base speaks like expert",
        "base": "folder/base",
        "expert": "folder/expert",
        "vocabulary_hash": "ab12" * 16,
        "positions": "all",
        "rank": 32,
        "refined": True,
        "data": {f"{s}_{n}": 100 for s in ("fit", "validation", "test") for n in ("documents", "windows", "tokens")},
        "no_op": {"kl": NO_OP, "stderr": 0.008, "top1": 0.61},
        "layers": [
            {"layer": layer, "name": name, "kl": kl, "share_removed": 1 - kl / NO_OP, **score}
            for layer, name, kl in ((0, "layer 0 of 2", 0.91), (1, "layer 1 of 2", 0.4), ("final", "final", 0.25))
        ],
        "ranks": [
            {"rank": rank, "kind": kind, "kl": kl, "share_removed": 1 - kl / NO_OP, **score, **share}
            for kind, curve in curves.items()
            for rank, kl in curve.items()
        ],
        "bits_per_byte": {"base": 2.56, "adapted": 2.34, "expert": 2.16, "gap_closed": 0.55},
        "spectrum": [0.12 * math.exp(-0.3 * i**0.75) for i in range(64)],
        "refinement": {
            "steps": [{"step": i, "train_kl": 0.3 - i / 500, "validation_kl": None if i % 5 else 0.3} for i in range(20)],
            "kept": True,
            "closed_form_validation_kl": 0.29,
            "validation_kl": 0.19,
            "no_op_validation_kl": 0.63,
        },
        "seconds": {"base_forward": 14.2, "expert_forward": 14.8, "statistics": 36.1, "closed_form": 0.4, "total": 67.0},
        "memory": {"moments_bytes": 1310720, "batch_bytes": 3145728, "peak_above_models_bytes": None},
        "generations": [{"prompt": "def f(", "base": " the time", "adapted": "x):\n    return", "expert": "self):"}],
        "passage": {"document": "1f2e", "tokens": tokens},
        "environment": {"python": "3.11", "torch": "2.13.0", "device": "cpu", "threads": 2},
    }
    return results | changes


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that does not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def printed(results: dict, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_report(results, console)
    return console.file.getvalue()


def test_report_has_page_numbers_and_pictures(tmp_path):
    page = write_report(example(), tmp_path / "new" / "folder")
    names = {path.name for path in page.parent.iterdir()}
    pictures = {"kl_by_rank.png", "kl_by_layer.png", "spectrum.png", "refinement.png", "bits_per_byte.png"}
    assert names == {"report.html", "report.json"} | pictures
    assert json.loads((page.parent / "report.json").read_text()) == example()
    for name in pictures:
        pixels = image.imread(page.parent / name)
        assert pixels.shape[0] > 300 and pixels.shape[1] > 800 and pixels[..., :3].std() > 0.05


def test_page_needs_nothing_but_itself(tmp_path):
    text = write_report(example(), tmp_path).read_text()
    page = Page(text)
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 5 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "http" not in re.sub("base64,[A-Za-z0-9+/=]+", "", text) and "url(" not in text


def test_all_text_is_escaped(tmp_path):
    tokens = [{"text": NASTY, "no_op_kl": 0.5, "kl": 0.1}]
    sample = dict.fromkeys(("prompt", "base", "adapted", "expert"), NASTY)
    passage = {"document": NASTY, "tokens": tokens}
    names = dict.fromkeys(("title", "base", "expert"), NASTY)
    results = example(**names, generations=[sample], passage=passage, environment={"device": NASTY})
    page = Page(write_report(results, tmp_path).read_text())
    assert "script" not in page.tags and page.text.count("<script>alert(") >= 9
    assert "\x1b" not in printed(results) and "[red]markup[/red]" in printed(results)


def test_every_kl_stands_beside_the_no_op_kl():
    for table in tables(example())[:2]:
        kl, no_op = table.columns.index("KL"), table.columns.index("no-op KL")
        assert no_op > kl and all(row.cells[no_op] == "0.625" for row in table.rows)
        assert all(len(row.cells) == len(table.columns) for row in table.rows)


def test_tables_fit_a_terminal_of_80_columns():
    text = printed(example())
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert "32 refined" in text and "0.188" in text and "return" in text


def test_parts_that_are_missing_are_left_out(tmp_path):
    least = {"no_op": {"kl": NO_OP}, "ranks": [{"rank": 8, "kind": "closed form", "kl": 0.5}]}
    page = Page(write_report(least, tmp_path).read_text())
    assert page.tags.count("img") == 1 and "Before and after" not in page.text and "held-out passage" not in page.text
    assert "8 closed form" in printed(least)
    without_expert = example(generations=[{"prompt": "a", "base": "b", "adapted": "c"}])
    assert "expert" not in printed(without_expert).split("Before and after")[1]


PARTS = ("layers", "ranks", "spectrum", "refinement", "bits_per_byte", "passage", "seconds", "memory", "generations", "data")


@pytest.mark.parametrize("parts", [PARTS, *((part,) for part in PARTS)], ids=lambda parts: "-".join(parts[:2]))
def test_an_empty_part_is_like_a_missing_one(tmp_path, monkeypatch, parts):
    if len(parts) == 1:
        monkeypatch.setattr("chassis.figures.draw_all", lambda results: {})
    empty = {part: None if part in ("refinement", "passage") else type(example()[part])() for part in parts}
    Page(write_report(example(**empty), tmp_path).read_text())
    printed(example(**empty))


def test_nan_becomes_null_and_a_dash(tmp_path):
    bits = {"base": 2.5, "adapted": 2.6, "expert": 2.7, "gap_closed": math.nan}
    results = example(bits_per_byte=bits, spectrum=[0.1, math.inf], no_op={"kl": NO_OP, "stderr": math.nan, "top1": 0.5})
    page = write_report(results, tmp_path)
    loaded = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert loaded["bits_per_byte"]["gap_closed"] is None and loaded["spectrum"] == [0.1, None]
    assert not re.search(r"\b(nan|inf|None)\b", Page(page.read_text()).text + printed(results))


def test_plain_keeps_text_and_drops_what_no_format_can_carry():
    assert plain({"a": ("é\n\t", "\x07\ud800", 1, True, None, 2.5)}) == {"a": ["é\n\t", "\ufffd\ufffd", 1, True, None, 2.5]}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ChassisError, match="file"):
        write_report(example(), tmp_path / "file")
