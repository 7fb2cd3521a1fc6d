"""What a distillation prints and draws: losses and held-out numbers, each KL beside the one before training."""

from __future__ import annotations

import io
import json
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chassis.figures import CLOSED, EXPERT, NO_OP, REFINED, STYLE
from chassis.files import write_folder
from chassis.page import Row, Table, count, number, plain, print_tables, render, share

COLOURS = (CLOSED, REFINED, EXPERT, "#8a5fb0")
CAPTIONS = {
    "losses": "Next-token cross-entropy and the sum of the teachers' KLs while training, normalised over each step.",
    "kl": "Held-out KL to each teacher. Dashed: before training, what doing nothing scores.",
    "bits_per_byte": "Held-out bits per byte of the student. Dashed: before training.",
}


def curves(history: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged number."""
    found = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def write_report(results: dict, folder: str | Path) -> Path:
    """Write report.html, results.json and the pictures into `folder`; returns the path of report.html."""
    results = plain(results)
    pictures = draw(results)
    files: dict[str, str | bytes] = {f"{name}.png": png for name, png in pictures.items()}
    files["results.json"] = json.dumps(results, indent=1, allow_nan=False)
    files["report.html"] = render(
        title=title(results),
        intro="KL in nats per chunk of text (per token for a teacher with the student's own tokenizer), on held-out "
        "documents. Before training is the no-op: what the student scores as it is.",
        cards=_cards(results),
        pictures=[(png, CAPTIONS[name]) for name, png in pictures.items()],
        tables=tables(results),
        notes=[
            ", ".join(f"{key} {value}" for key, value in (results.get("environment") or {}).items() if value is not None)
        ],
    )
    return write_folder(folder, files) / "report.html"


def print_report(results: dict, console) -> None:
    """Print the tables to a rich console."""
    from rich.text import Text

    console.print(Text(title(results), "bold"), "\n")
    print_tables(tables(plain(results)), console)


def title(results: dict) -> str:
    return f"{results['student']} learns from {' and '.join(results['teachers'])}"


def tables(results: dict) -> list[Table]:
    """Held-out numbers before and after; what a step cost."""
    history = results["history"]
    rows = []
    for key, name in _measures(results).items():
        _, values = curves(history, key)
        if values:
            change = values[-1] / values[0] if values[0] else None
            as_share = key.endswith("accuracy")
            shown = [share(v) if as_share else number(v) for v in (values[0], values[-1])]
            rows.append(Row([name, *shown, share(change)]))
    found = [Table("On held-out documents", ["measure", "no-op", "after", "ratio"], rows)]
    compared = [
        Row([name, number(curve[0][1]), number(curve[-1][1]), share(curve[-1][1] / curve[0][1])], "noop")
        for name, curve in (results.get("compared") or {}).items()
        if curve
    ]
    rows[1:1] = [Row([f"  {row.cells[0]}", *row.cells[1:]], row.style) for row in compared]
    costs = [
        Row(["optimizer steps", count(results["steps"])]),
        Row(["samples to train on", count(results["samples"])]),
        Row(["seconds in all", number(results["seconds"])]),
    ]
    return [table for table in (*found, Table("Cost", ["what", "value"], costs)) if table.rows]


def draw(results: dict) -> dict[str, bytes]:
    """PNG bytes by name; a picture without data is left out."""
    pictures = {}
    with rc_context(STYLE):
        for name, paint in (("losses", _losses), ("kl", _kl), ("bits_per_byte", _bits)):
            figure = Figure(figsize=(6.6, 3.8), dpi=160, layout="constrained")
            if paint(figure.add_subplot(), results):
                buffer = io.BytesIO()
                figure.savefig(buffer, format="png", facecolor="white")
                pictures[name] = buffer.getvalue()
    return pictures


def _measures(results: dict) -> dict[str, str]:
    names = {"eval_bits_per_byte": "bits per byte", "eval_accuracy": "top-1 of the next token"}
    return names | {f"eval_kl_loss_t{i}": f"KL to {name}" for i, name in enumerate(results["teachers"])}


def _losses(axes: Axes, results: dict) -> bool:
    drawn = False
    for key, name, colour in (("ce_loss", "cross-entropy", CLOSED), ("kl_loss", "KL to the teachers", REFINED)):
        steps, values = curves(results["history"], key)
        if steps:
            axes.plot(steps, values, color=colour, label=name)
            drawn = True
    axes.set(title="Training losses", xlabel="optimizer step", ylabel="nats", ylim=(0, None))
    if drawn:
        axes.legend()
    return drawn


def _kl(axes: Axes, results: dict) -> bool:
    drawn = False
    for i, name in enumerate(results["teachers"]):
        steps, values = curves(results["history"], f"eval_kl_loss_t{i}")
        if steps:
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(steps, values, color=colour, marker="o", label=name)
            axes.axhline(values[0], color=colour, linestyle="--", linewidth=1)
            drawn = True
    axes.set(title="Held-out KL to each teacher", xlabel="optimizer step", ylabel="nats", ylim=(0, None))
    if drawn:
        axes.legend()
    return drawn


def _bits(axes: Axes, results: dict) -> bool:
    steps, values = curves(results["history"], "eval_bits_per_byte")
    if not steps:
        return False
    axes.plot(steps, values, color=CLOSED, marker="o", label="student")
    axes.axhline(values[0], color=NO_OP, linestyle="--", linewidth=1, label="before training")
    for name, curve in (results.get("compared") or {}).items():
        axes.plot(*zip(*curve, strict=True), color=REFINED, marker="s", label=name)
    axes.set(title="Held-out bits per byte", xlabel="optimizer step", ylabel="bits per byte")
    axes.legend()
    return True


def _cards(results: dict) -> list[dict]:
    cards = []
    for key, name in _measures(results).items():
        _, values = curves(results["history"], key)
        if values:
            shown = share if key.endswith("accuracy") else number
            cards.append({"label": name, "value": shown(values[-1]), "note": f"before training {shown(values[0])}"})
    return cards
