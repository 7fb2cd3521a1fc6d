"""Tables of rows: for the terminal every provider, for the README ours against eager and torch.compile."""

from __future__ import annotations

from benchmarks.cases import DTYPES, OPS

VARIANTS = {"chassis": "", "chassis_reused": ", reused gradient", "chassis_in_place": ", gradient in place"}
HEAD = ("op", "shape", *(f"{dtype}, × eager (× compile)" for dtype in DTYPES), "peak MiB, ours / eager")


def table(rows: list[dict]):
    """Rich tables of the rows that were timed, one a case; the others' reasons below them."""
    from rich.console import Group

    made, reasons = {}, {}
    for row in sorted(rows, key=lambda row: OPS.index(row["op"])):
        case = f"{row['op']}  {_shape(row)}  {row['dtype']}"
        if row["status"] != "ok":
            reasons.setdefault((row["op"], row["provider"], row["status"], row["reason"]), case)
            continue
        if case not in made:
            made[case] = _columns(case, row["ceiling"])
        ratio = "" if row["ratio_to_eager"] is None else f"{row['ratio_to_eager']:.2f}"
        width = 100 * (row["p80_ms"] - row["p20_ms"]) / row["median_ms"]
        times = f"{row['median_ms']:.3f}", f"{width:.0f} %", ratio
        made[case].add_row(
            row["provider"], *times, f"{row['peak_bytes'] / 2**20:.1f}", f"{row['error']:.1e}", f"{100 * row['share']:.0f} %"
        )
    lines = [f"{provider} {status}: {reason}  ({case})" for (_, provider, status, reason), case in reasons.items()]
    return Group(*made.values(), *lines)


def markdown(rows: list[dict]) -> str:
    """One line per op, shape and way of calling ours; ratios are medians over the rounds, memory that of the first dtype."""
    timed = {(row["op"], _shape(row), row["provider"], row["dtype"]): row for row in rows if row["status"] == "ok"}
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    known = dict.fromkeys((op, shape, provider) for op, shape, provider, _ in timed)
    for op, shape, provider in sorted(known, key=lambda key: OPS.index(key[0])):
        if provider not in VARIANTS:
            continue
        ratios, peak = [], ""
        for dtype in DTYPES:
            ours, eager, compiled = (timed.get((op, shape, name, dtype)) for name in (provider, "eager", "compile"))
            if ours is None:
                ratios.append("")
                continue
            beside = f" ({compiled['median_ms'] / ours['median_ms']:.1f})" if compiled else ""
            ratios.append(f"{ours['ratio_to_eager']:.1f}{beside}")
            peak = peak or f"{_mebibytes(ours)} / {_mebibytes(eager)}"
        lines.append("| " + " | ".join((f"`{op}`{VARIANTS[provider]}", shape, *ratios, peak)) + " |")
    return "\n".join(lines)


def _mebibytes(row: dict) -> str:
    return f"{row['peak_bytes'] / 2**20:.3g}"


def _shape(row: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in row["shape"].items())


def _columns(title: str, ceiling: str):
    import rich.box
    from rich.table import Table

    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, title=f"{title}  (share of {ceiling})", title_justify="left")
    table.add_column("provider", min_width=15)
    for name in ("median ms", "p20-p80", "× eager", "peak MiB", "error", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    return table
