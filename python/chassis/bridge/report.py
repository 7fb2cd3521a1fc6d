"""The ladder of estimators as tables, a picture, and one passage token by token."""

from __future__ import annotations

import io
import json
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from chassis.bridge.evaluate import MIXTURE
from chassis.figures import CLOSED, EXPERT, NO_OP, REFINED, STYLE
from chassis.files import write_folder
from chassis.page import Row, Table, count, number, plain, print_tables, render, share

OWN, BASE = "expert in its own tokens", "base alone"
COLOURS = {OWN: EXPERT, BASE: NO_OP, MIXTURE: REFINED}
CAPTION = "Bits per byte of held-out text, over every base position and from the text before it alone. Lower is better."
WARM, COOL = (232, 96, 60), (47, 109, 181)


def write_report(results: dict, folder: str | Path) -> Path:
    """Write bridge.html, bridge.json and ladder.png into `folder`; returns the path of bridge.html."""
    results = plain(results)
    picture = ladder(results)
    page = render(
        "bridge.html",
        title=title(results),
        intro="Bits per byte of held-out text. The base alone is the no-op: what it scores without the expert. KL is "
        "measured against a lookahead reference, in bits, where both tokenizations have ended.",
        cards=_cards(results),
        pictures=[(picture, CAPTION)],
        tables=tables(results),
        passage=passage(results),
        notes=[", ".join(f"{k} {v}" for k, v in (results.get("environment") or {}).items() if v is not None)],
    )
    files = {"bridge.html": page, "ladder.png": picture, "bridge.json": json.dumps(results, indent=1, allow_nan=False)}
    return write_folder(folder, files) / "bridge.html"


def print_report(results: dict, console) -> None:
    """Print the tables to a rich console."""
    from rich.text import Text

    console.print(Text(title(results), "bold"), "\n")
    print_tables(tables(plain(results)), console)


def title(results: dict) -> str:
    return f"{results['expert']} read in the tokens of {results['base']}"


def tables(results: dict) -> list[Table]:
    """The ladder, and what the two vocabularies have in common."""
    names = {row["name"]: row for row in results["rows"]}
    rows, measured = [], any("kl_bits" in row for row in results["rows"])
    for row in results["rows"]:
        gaps = [row["bits_per_byte"] - names[other]["bits_per_byte"] for other in (OWN, BASE)]
        cells = [row["name"], number(row["bits_per_byte"]), *(f"{gap:+.3f}" for gap in gaps)]
        cells += [number(row.get("kl_bits")), share(row.get("top1"))] if measured else []
        cells += [number(row.get("uncertainty")), number(row.get("uncertainty_p95")), share(row.get("unmapped"))]
        style = "noop" if row["name"] == BASE else "chosen" if row["name"] == results["main"] else ""
        rows.append(Row(cells, style))
    kl = ["KL bits", "top-1"] if measured else []
    columns = ["estimator", "bits/byte", "vs expert", "vs base", *kl, "mean u", "u 95 %", "unmapped"]
    return [Table("The ladder of estimators", columns, rows), coverage_table(results["coverage"])]


def coverage_table(coverage: dict) -> Table:
    """What `Bridge.coverage` counts."""
    labels = {
        "expert_tokens": "expert's tokens",
        "base_tokens": "base's tokens",
        "byte_equal": "equal bytes",
        "byte_equal_share": "equal, of the smaller vocabulary",
        "unmapped_tokens": "expert's tokens that reach nothing",
        "entries_per_token": "entries a token",
        "certain_tokens": "tokens that fix the base's token",
        "residuals": "ends of tokens with a row",
        "table_bytes": "bytes of the table",
    }
    rows = []
    for key, label in labels.items():
        value = coverage[key]
        shown = (
            share(value)
            if key in ("byte_equal_share", "certain_tokens")
            else count(value)
            if isinstance(value, int)
            else number(value)
        )
        rows.append(Row([label, shown]))
    if coverage["special_pairs"]:
        rows.append(Row(["special tokens", ", ".join(f"{a} = {b}" for a, b in coverage["special_pairs"].items())]))
    return Table("What the vocabularies share", ["what", "value"], rows)


def ladder(results: dict) -> bytes:
    """Bars of bits per byte, PNG."""
    rows = results["rows"]
    with rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(7.6, 0.32 * len(rows) + 1.2), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        names = [row["name"] for row in rows][::-1]
        values = [row["bits_per_byte"] for row in rows][::-1]
        axes.barh(names, values, color=[COLOURS.get(name, CLOSED) for name in names], height=0.66)
        for place, value in enumerate(values):
            axes.text(value, place, f" {value:.3f}", va="center", fontsize=9)
        axes.set_xlim(0, max(values) * 1.12)
        axes.margins(y=0.02)
        axes.set(title="Bits per byte by estimator", xlabel="bits per byte")
        axes.tick_params(axis="y", length=0)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def passage(results: dict) -> list[dict]:
    """One passage four times: how uncertain the bridge was, and how many bits each of the speakers spent on every token."""
    views = {
        "uncertainty of the bridge": ("tokens", "uncertainty", 1.0, COOL),
        "bits of the bridged expert": ("tokens", "bridge_bits", 8.0, WARM),
        "bits of the expert in its own tokens": ("expert_tokens", "expert_bits", 8.0, WARM),
        "bits of the base": ("tokens", "base_bits", 8.0, WARM),
    }
    found = []
    for name, (kind, key, top, colour) in views.items():
        cells = []
        for token in (results.get("passage") or {}).get(kind) or []:
            body = token["text"].rstrip("\n")
            level = min(max((token[key] or 0) / top, 0.0), 1.0)
            shade = "#" + "".join(f"{round(255 + (part - 255) * level * 0.75):02x}" for part in colour)
            cells.append(
                {"text": body or "↵", "tail": token["text"][len(body) :], "value": number(token[key]), "colour": shade}
            )
        if cells:
            found.append({"name": f"{name}, 0 to {top:g} and more", "tokens": cells})
    return found


def _cards(results: dict) -> list[dict]:
    names = {row["name"]: row for row in results["rows"]}
    main, own, base = names[results["main"]], names[OWN], names[BASE]
    cards = [
        {
            "label": "Bits per byte through the bridge",
            "value": number(main["bits_per_byte"]),
            "note": f"expert in its own tokens {number(own['bits_per_byte'])}, base alone {number(base['bits_per_byte'])}",
        },
        {
            "label": "Lost by the bridge",
            "value": f"{main['bits_per_byte'] - own['bits_per_byte']:+.3f}",
            "note": "bits per byte against the expert's own tokens",
        },
        {
            "label": MIXTURE.capitalize(),
            "value": number(names[MIXTURE]["bits_per_byte"]),
            "note": f"weight of the base {results['mixture_weight']:g}, fitted on validation documents",
        },
    ]
    return cards
