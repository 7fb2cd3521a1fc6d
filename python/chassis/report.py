"""Results as JSON, as a page that needs nothing but itself, and as tables for the terminal.

`results` is what `chassis.evaluate` puts together: KLs in nats per token, each beside the no-op KL (the base as it is).
Whatever is missing from it (no lenses asked for, no refinement, no passage) is left out of the report.
"""

from __future__ import annotations

import json
from pathlib import Path

from chassis.files import write_folder
from chassis.page import RAMP, Row, Table, colour, count, number, plain, print_tables, render, share, size

CAPTIONS = {
    "kl_by_rank": "KL of the adapter at each rank. Dashed: what doing nothing scores. Right axis: the share of it removed.",
    "kl_by_layer": "KL of the affine lens read off each layer; the last point is the input of the unembedding.",
    "spectrum": "KL that each direction of the full-rank change explains, to second order. Shaded: what the adapter keeps.",
    "refinement": "KL while the adapter is refined; the best step on validation documents is kept, or else the closed form.",
    "bits_per_byte": "Bits per byte on the same test documents: the base, the base with its adapter, the expert.",
}


def write_report(results: dict, folder: str | Path) -> Path:
    """Write report.json, report.html and the pictures as PNG files into `folder`; returns the path of report.html.

    Raises ChassisError if the folder cannot be written.
    """
    from chassis.figures import draw_all

    results = plain(results)
    pictures = draw_all(results)
    files: dict[str, str | bytes] = {f"{name}.png": png for name, png in pictures.items()}
    files["report.json"] = json.dumps(results, indent=2, allow_nan=False)
    files["report.html"] = _html(results, pictures)
    return write_folder(folder, files) / "report.html"


def print_report(results: dict, console) -> None:
    """Print the tables and the generations to a rich console."""
    from rich.text import Text

    results = plain(results)
    if results.get("title"):
        console.print(Text(results["title"], "bold"), "\n")
    print_tables(tables(results), console)
    if results.get("generations"):
        print_generations(results["generations"], console)


def print_generations(generations: list[dict], console, *, routes: bool = False) -> None:
    """Continuations side by side, each under the model that wrote it; with `routes`, who it was and why."""
    import rich.box
    from rich.table import Table as RichTable
    from rich.text import Text

    generations, names = plain(generations), speakers(generations)
    grid = RichTable(title="Before and after", title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD)
    for name in names:
        grid.add_column(name, ratio=1, overflow="fold")
    if routes:
        grid.add_column("route\n(nats per token of the prompt)", overflow="fold")
    for sample in generations:
        cells = [Text.assemble((sample["prompt"], "dim"), sample[name]) for name in names]
        grid.add_row(*cells, *([_route(sample)] if routes else []))
        grid.add_section()
    console.print(grid)


def _route(sample: dict) -> str:
    """Who spoke and, line by line, how surprised each was by the prompt."""
    route = sample["route"]
    chosen = route if isinstance(route, str) else ", ".join(f"{name}={weight:g}" for name, weight in route.items())
    return "\n".join([chosen, *(f"  {name} {number(value)}" for name, value in sample["surprise"].items())])


def speakers(generations: list[dict]) -> list[str]:
    """Those of base, adapted, both and expert that every sample has text of."""
    return [name for name in ("base", "adapted", "both", "expert") if all(name in sample for sample in generations)]


def tables(results: dict) -> list[Table]:
    """The numbers of a report: adapters by rank, lenses by layer, time, memory and data."""
    return [t for t in (_ranks(results), _layers(results), _costs(results), _data(results)) if t.rows]


def _ranks(results: dict) -> Table:
    columns = ["rank", "KL", "±", "no-op KL", "removed", "top-1", "bits/byte", "gap closed", "parameters", "size"]
    no_op, bits, rows = results["no_op"], results.get("bits_per_byte") or {}, []
    for row in results.get("ranks") or []:
        name = f"{row['rank']} {row['kind']}" + (f", {row['columns']} columns" if row.get("columns") else "")
        cells = [name, *_kl(row, no_op), share(row.get("top1"))]
        cells += [number(row.get("bits_per_byte")), share(row.get("gap_closed"))]
        rows.append(Row(cells + [count(row.get("parameters")), size(row.get("bytes"))], _if_chosen(row, results)))
    first = ["no-op (base)", *_kl(no_op | {"share_removed": 0.0}, no_op), share(no_op.get("top1"))]
    first = Row(first + [number(bits.get("base")), share(0.0), "", ""], "noop")
    return Table("Adapters by rank", columns, [first, *rows] if rows else [])


def _layers(results: dict) -> Table:
    rows = [Row([row["name"], *_kl(row, results["no_op"]), share(row.get("top1"))]) for row in results.get("layers") or []]
    return Table("Lenses by layer", ["lens", "KL", "±", "no-op KL", "removed", "top-1"], rows)


def _costs(results: dict) -> Table:
    seconds, memory = results.get("seconds") or {}, results.get("memory") or {}
    labels = {
        "statistics": "pass over the text",
        "base_forward": "  of it the base's forward",
        "expert_forward": "  of it the expert's forward",
        "validation_rows": "rows of validation documents",
        "closed_form": "closed form",
        "plain_forward": "beside it: both plain forwards",
        "refine": "refinement",
        "evaluate": "evaluation",
        "total": "total",
    }
    rows = [Row([label, f"{seconds[key]:.1f} s"]) for key, label in labels.items() if seconds.get(key) is not None]
    if plain := seconds.get("plain_forward"):
        times = (seconds["statistics"] + seconds["closed_form"]) / plain
        rows.append(Row(["pass and closed form, in plain forwards", f"{times:.1f} ×"]))
    sizes = {
        "moments_bytes": "memory: moments",
        "batch_bytes": "memory: one batch",
        "peak_above_models_bytes": "memory: peak above the models",
    }
    rows += [Row([label, size(memory[key])]) for key, label in sizes.items() if memory.get(key) is not None]
    return Table("Time and memory", ["what", "cost"], rows)


def _data(results: dict) -> Table:
    data = results.get("data") or {}
    names = ("documents", "windows", "tokens")
    rows = [
        Row([split, *(count(data.get(f"{split}_{name}")) for name in names)])
        for split in ("fit", "validation", "test")
        if data.get(f"{split}_tokens") is not None
    ]
    return Table("Text", ["split", *names], rows)


def _html(results: dict, pictures: dict[str, bytes]) -> str:
    return render(
        "report.html",
        title=results.get("title") or "chassis report",
        pictures=[(png, CAPTIONS[name]) for name, png in pictures.items()],
        r=results,
        cards=_cards(results),
        tables=tables(results),
        passage=_passage(results),
        ramp=RAMP,
        notes=_notes(results),
        speakers=speakers(results.get("generations") or []),
    )


def _cards(results: dict) -> list[dict]:
    no_op, scores, seconds = results["no_op"], results.get("bits_per_byte") or {}, results.get("seconds") or {}
    chosen = next((row for row in results.get("ranks") or [] if _if_chosen(row, results)), None)
    cards = []

    def card(label: str, value: str, note: str) -> None:
        cards.append({"label": label, "value": value, "note": note})

    if chosen:
        removed = f"no-op {number(no_op['kl'])}: {share(chosen.get('share_removed'))} removed"
        card("KL to the expert", number(chosen["kl"]), removed)
        card("Top-1 agreement", share(chosen.get("top1")), f"no-op {share(no_op.get('top1'))}")
    if scores.get("adapted") is not None:
        ends = f"base {number(scores.get('base'))}, expert {number(scores.get('expert'))}"
        card("Bits per byte", number(scores["adapted"]), f"{ends}: {share(scores.get('gap_closed'))} of the gap closed")
    if chosen and chosen.get("bytes") is not None:
        kind = f"rank {chosen['rank']}, {chosen['kind']}"
        card("Adapter on disk", size(chosen["bytes"]), f"{count(chosen.get('parameters'))} parameters, {kind}")
    if seconds.get("total") is not None:
        stages = {"statistics": "the pass over the text", "refine": "refinement"}
        parts = [f"{seconds[key]:.0f} s {label}" for key, label in stages.items() if seconds.get(key) is not None]
        card("Time", f"{seconds['total']:.0f} s", ", ".join(parts))
    return cards


def _passage(results: dict) -> dict | None:
    tokens = (results.get("passage") or {}).get("tokens") or []
    values = sorted(t["no_op_kl"] for t in tokens if t["no_op_kl"] is not None)
    if not values:
        return None
    top = max(values[int(0.95 * (len(values) - 1))], 0.1)

    def side(name: str, key: str) -> dict:
        cells = []
        for token in tokens:
            body = token["text"].rstrip("\n")
            kl = token[key]
            shade = "transparent" if kl is None else colour(kl / top)
            cells.append({"text": body or "↵", "tail": token["text"][len(body) :], "kl": number(kl), "colour": shade})
        return {"name": name, "tokens": cells}

    def mean(key: str) -> str:
        kept = [t[key] for t in tokens if t[key] is not None]
        return number(sum(kept) / len(kept) if kept else None)

    sides = [side("no-op: the base as it is", "no_op_kl"), side("adapted", "kl")]
    return {"top": f"{top:.1f}", "before": mean("no_op_kl"), "after": mean("kl"), "sides": sides}


def _notes(results: dict) -> list[str]:
    environment = results.get("environment") or {}
    notes = [f"Positions: {results.get('positions', 'all')}."]
    if results.get("vocabulary_hash"):
        notes.append(f"Vocabulary {results['vocabulary_hash'][:12]}.")
    notes.append(", ".join(f"{key} {value}" for key, value in environment.items() if value is not None))
    return [note for note in notes if note]


def _if_chosen(row: dict, results: dict) -> str:
    kind = "refined" if results.get("refined") else "closed form"
    return "chosen" if (row["rank"], row["kind"]) == (results.get("rank"), kind) else ""


def _kl(row: dict, no_op: dict) -> list[str]:
    """Cells for KL, its standard error, the no-op KL and the share of it removed."""
    return [number(row["kl"]), number(row.get("stderr")), number(no_op["kl"]), share(row.get("share_removed"))]
