"""The ladder of estimators as tables, a picture, and one passage token by token."""

from __future__ import annotations

import io
import json
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chassis.bridge.evaluate import MIXTURE
from chassis.figures import CLOSED, EXPERT, NO_OP, REFINED, STYLE
from chassis.files import write_folder
from chassis.page import Row, Table, count, number, plain, print_tables, render, share

OWN, BASE = "expert in its own tokens", "base alone"
COLOURS = {OWN: EXPERT, BASE: NO_OP, MIXTURE: REFINED}
CAPTION = (
    "Every base position counts, each predicted from the text before it alone. Dashed: the expert in its own tokens, and "
    "the base alone, which is the no-op. Lower is better."
)
WIDEST = 1.5  # of the base's bits per byte: longer bars are cut
WARM, COOL = (232, 96, 60), (47, 109, 181)


def write_report(results: dict, folder: str | Path) -> Path:
    """Write bridge.html, bridge.json and ladder.png into `folder`; returns the path of bridge.html."""
    results = plain(results)
    picture = ladder(results)
    page = render(
        "bridge.html",
        title=title(results),
        intro=_intro(results),
        cards=_cards(results),
        pictures=[(picture, CAPTION)],
        tables=tables(results),
        passage=passage(results),
        notes=[
            f"{results['test_windows']} windows, {count(results['test_bytes'])} bytes of held-out text",
            ", ".join(f"{k} {v}" for k, v in (results.get("environment") or {}).items() if v is not None),
        ],
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
    """Bits per byte as bars and, where there is a reference, the KL to it as points; PNG."""
    rows, measured = results["rows"], any("kl_bits" in row for row in results["rows"])
    with rc_context(STYLE | {"axes.grid.axis": "x"}):
        size = (9.4 if measured else 7.6, 0.32 * len(rows) + 1.4)
        figure = Figure(figsize=size, dpi=160, layout="constrained")
        panels = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2)) if measured else [figure.add_subplot()]
        _bars(panels[0], rows)
        if measured:
            _points(panels[1], rows, results["reference"])
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def _bars(axes: Axes, rows: list[dict]) -> None:
    levels = {row["name"]: row["bits_per_byte"] for row in rows}
    end = min(max(levels.values()), WIDEST * levels[BASE])
    axes.barh(list(levels), [min(value, end) for value in levels.values()], color=_colours(rows), height=0.66)
    for place, value in enumerate(levels.values()):
        look = {"va": "center", "fontsize": 9, "textcoords": "offset points"}
        if value > end:
            axes.annotate(f"{value:.3f} →", (end, place), (-5, 0), ha="right", color="white", **look)
        else:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            axes.annotate(f"{value:.3f}", (value, place), (5, 0), bbox=box, **look)
    for name in (OWN, BASE):
        axes.axvline(levels[name], color=COLOURS[name], linewidth=1.2, linestyle=(0, (5, 3)), zorder=0.5)
    axes.invert_yaxis()
    axes.set_xlim(0, end * 1.12)
    axes.margins(y=0.02)
    axes.set(title="Bits per byte of held-out text", xlabel="bits per byte")
    axes.tick_params(axis="y", length=0)


def _points(axes: Axes, rows: list[dict], reference: int) -> None:
    for place, (row, colour) in enumerate(zip(rows, _colours(rows), strict=True)):
        if row.get("kl_bits"):
            axes.plot(row["kl_bits"], place, "o", color=colour)
            axes.text(row["kl_bits"], place, f"   {row['kl_bits']:.3f}", va="center", fontsize=9)
        else:
            axes.text(0.03, place, "–", va="center", transform=axes.get_yaxis_transform(), color="#5b636d")
    axes.set_xscale("log")
    axes.margins(x=0.4)
    axes.set(title=f"KL to a lookahead of {reference}", xlabel="bits per position, log scale")
    axes.tick_params(axis="y", length=0)


def _colours(rows: list[dict]) -> list[str]:
    return [COLOURS.get(row["name"], CLOSED) for row in rows]


def passage(results: dict) -> list[dict]:
    """One passage four times: how uncertain the bridge was, and how many bits each of the speakers spent on every token."""
    views = {
        "Uncertainty of the bridge": ("tokens", "uncertainty", 1.0, "1", COOL),
        "Surprise of the expert in its own tokens": ("expert_tokens", "expert_bits", 8.0, "8 bits and more", WARM),
        "Surprise of the expert through the bridge": ("tokens", "bridge_bits", 8.0, "8 bits and more", WARM),
        "Surprise of the base": ("tokens", "base_bits", 8.0, "8 bits and more", WARM),
    }
    found = []
    for name, (kind, key, top, most, colour) in views.items():
        tokens = (results.get("passage") or {}).get(kind) or []
        values = [token[key] for token in tokens if token[key] is not None]
        if not values:
            continue
        cells = []
        for token in tokens:
            body = token["text"].rstrip("\n")
            level = min(max((token[key] or 0) / top, 0.0), 1.0)
            unit = "" if kind == "tokens" and key == "uncertainty" else " bits"
            cells.append(
                {
                    "text": body or "↵",
                    "tail": token["text"][len(body) :],
                    "value": number(token[key]) + unit,
                    "colour": _shade(colour, level),
                }
            )
        mean = f"mean {number(sum(values) / len(values))}{'' if key == 'uncertainty' else ' bits a token'}"
        found.append({"name": name, "mean": mean, "top": most, "ramp": [_shade(colour, x) for x in (0, 1)], "tokens": cells})
    return found


def _shade(colour: tuple[int, int, int], level: float) -> str:
    return "#" + "".join(f"{round(255 + (part - 255) * level * 0.75):02x}" for part in colour)


def _intro(results: dict) -> str:
    text = (
        "What the expert's next-token probabilities are worth once they are read in the base's tokens. u, the uncertainty: "
        "the probability of which the bridge cannot tell the base's token. Unmapped: the probability no token was found for."
    )
    if results.get("reference"):
        text += (
            f" KL, in bits, and top-1 agreement are against a lookahead of {results['reference']} evaluations a position, "
            "where tokens of both end."
        )
    return text


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
            "note": f"bits per byte; weight of the base {results['mixture_weight']:g}, fitted on validation documents",
        },
    ]
    if "kl_bits" in main:
        note = f"bits, to a lookahead of {results['reference']}; base alone (no-op) {number(base.get('kl_bits'))}"
        cards.append({"label": "KL through the bridge", "value": number(main["kl_bits"]), "note": note})
    return cards
