"""What every report is made of: tables for the terminal and a page that needs nothing but itself."""

from __future__ import annotations

import base64
import math
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

RAMP = ("#ffffff", "#ffe0b2", "#faa368", "#e8603c")  # from nothing to much
PAGE_ONLY = ("±", "parameters", "vs base", "u 95 %")  # columns that a terminal has no room for


class Row(NamedTuple):
    """Cells of a table row; `style` is "", "noop" or "chosen"."""

    cells: list[str]
    style: str = ""


class Table(NamedTuple):
    title: str
    columns: list[str]
    rows: list[Row]


def print_tables(tables: Sequence[Table], console) -> None:
    """Print tables to a rich console."""
    import rich.box
    from rich.table import Table as RichTable
    from rich.text import Text

    look = {"title_justify": "left", "title_style": "bold", "box": rich.box.SIMPLE_HEAD}
    styles = {"": None, "noop": "dim", "chosen": "bold green"}
    for table in tables:
        grid = RichTable(**look, title=table.title, pad_edge=False)
        shown = [position for position, name in enumerate(table.columns) if name not in PAGE_ONLY]
        for position in shown:
            name = table.columns[position].replace(" ", "\n").replace("/", "/\n")  # to fit 80 columns
            grid.add_column(name, justify="right" if position else "left", no_wrap=True)
        for row in table.rows:
            grid.add_row(*(Text(row.cells[position]) for position in shown), style=styles[row.style])
        console.print(grid)


def render(template: str = "page.html", *, title: str, pictures: Sequence[tuple[bytes, str]] = (), **content) -> str:
    """An HTML page with its `pictures` (PNG, caption) inside it. `content`: intro, cards [{label, value, note}], tables,
    notes, and whatever the template's own blocks read."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("chassis", "assets"), autoescape=True)
    encoded = [{"data": base64.b64encode(png).decode(), "caption": caption} for png, caption in pictures]
    return environment.get_template(template).render(title=title, pictures=encoded, **{"ramp": []} | content)


def colour(level: float) -> str:
    """A point of RAMP, 0 at its start and 1 or more at its end."""
    position = min(max(level, 0.0), 1.0) * (len(RAMP) - 1)
    left = min(int(position), len(RAMP) - 2)
    low, high = (bytes.fromhex(end.removeprefix("#")) for end in RAMP[left : left + 2])
    return "#" + "".join(f"{round(a + (b - a) * (position - left)):02x}" for a, b in zip(low, high, strict=True))


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}".replace("%", " %")


def count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def size(n_bytes: float | None) -> str:
    if n_bytes is None:
        return "–"
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"


def plain(value):
    """A copy fit for JSON, HTML and a terminal: NaN and infinity become None, control characters U+FFFD."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str):
        return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in value)
    if isinstance(value, bool | int | None):
        return value
    return float(value) if math.isfinite(value) else None
