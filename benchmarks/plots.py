"""Pictures of rows: time and memory against each size that varies, a roofline, and ratios to eager as bars."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

LABELS = {"N": "rows N", "T": "positions T", "V": "vocabulary V", "V_s": "student vocabulary V_s", "D": "width D"}
LABELS_OF = {("moments", "T"): "targets T", ("ridge_cv", "T"): "targets T"}
FOLLOWS = {"D": "T", "V_s": "V_t"}  # sizes that move together where they are equal
MARKERS = "osD^vP*X<>phd8"
OURS, OTHERS = (
    ("tab:blue", "tab:cyan", "tab:purple", "tab:green"),
    ("tab:gray", "tab:orange", "tab:red", "tab:brown", "tab:olive"),
)


def plot(rows: list[dict], out: Path) -> list[Path]:
    """Write `<out's stem>-<op>-<what>.png` beside `out`, and return the paths; only rows that were timed are drawn."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    rows = [row for row in rows if row["status"] == "ok"]
    written = []
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        for name in LABELS:
            written += _against(mine, name, out.with_name(f"{out.stem}-{op}-{name}.png"))
        written += _ratios(mine, out.with_name(f"{out.stem}-{op}-ratios.png"))
    return written + (_roofline(rows, out.with_name(f"{out.stem}-roofline.png")) if rows else [])


def _against(rows: list[dict], name: str, path: Path) -> list[Path]:
    """Time and peak memory over the size `name`, for the largest family of float32 rows that differs in it alone."""
    families = defaultdict(list)
    for row in rows:
        if row["shape"].get(name) and row["dtype"] == "fp32":
            follower = FOLLOWS.get(name)
            same = {name, follower} if row["shape"].get(follower) == row["shape"][name] else {name}
            families[tuple((key, value) for key, value in row["shape"].items() if key not in same)].append(row)
    best = max(families.values(), key=lambda family: len({row["shape"][name] for row in family}), default=[])
    if len({row["shape"][name] for row in best}) < 2:
        return []
    figure, axes = _axes(2)
    colours = _colours(best)
    for provider, colour in colours.items():
        line = sorted((row for row in best if row["provider"] == provider), key=lambda row: row["shape"][name])
        sizes = [row["shape"][name] for row in line]
        low, high = ([row[key] for row in line] for key in ("p20_ms", "p80_ms"))
        axes[0].plot(sizes, [row["median_ms"] for row in line], marker="o", color=colour, label=provider)
        axes[0].fill_between(sizes, low, high, color=colour, alpha=0.2, lw=0)
        axes[1].plot(sizes, [max(row["peak_bytes"], 1 << 12) / 2**20 for row in line], marker="o", color=colour)
    ticks = []
    for size in sorted({row["shape"][name] for row in best}):
        if not ticks or size > 1.2 * ticks[-1]:  # labels of sizes that are nearly equal would overlap
            ticks.append(size)
    for axis, what in zip(axes, ("median ms, band p20 to p80", "peak MiB beyond the inputs"), strict=True):
        _proportional(axis, ticks)
        axis.set(xlabel=LABELS_OF.get((best[0]["op"], name), LABELS[name]), ylabel=what, xscale="log", yscale="log")
        axis.set_xticks(ticks, ticks, minor=False)
        axis.minorticks_off()
        _plain(axis.yaxis)
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    fixed = " ".join(f"{key}={value}" for key, value in best[0]["shape"].items() if key not in (name, FOLLOWS.get(name)))
    return _save(figure, f"{best[0]['op']}, fp32, {fixed}; dotted: proportional to {name}", path)


def _colours(rows: list[dict]) -> dict[str, str]:
    """Blues for ours, the same for a provider whatever else is in the picture beside it."""
    names = list(dict.fromkeys(row["provider"] for row in rows))
    ours = [name for name in names if name.startswith("chassis")]
    others = [name for name in names if name not in ours]
    return {
        name: colours[i % len(colours)]
        for group, colours in ((ours, OURS), (others, OTHERS))
        for i, name in enumerate(group)
    }


def _proportional(axis, sizes: list[int]) -> None:
    """A dotted line of slope one from the first provider's first point: what is linear in the size runs along it."""
    start = axis.get_lines()[0].get_ydata()[0]
    axis.plot(sizes, [start * size / sizes[0] for size in sizes], "k:", lw=1)


def _plain(axis) -> None:
    """Ticks at 1, 2 and 5 in each decade, written out."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def _ratios(rows: list[dict], path: Path) -> list[Path]:
    rows = [row for row in rows if row["ratio_to_eager"] is not None and row["provider"] != "eager"]
    if not rows:
        return []
    figure, (axis,) = _axes(1, height=1.2 + 0.24 * len(rows))
    for place, row in enumerate(reversed(rows)):
        ours = row["provider"].startswith("chassis")
        axis.barh(place, row["ratio_to_eager"], color="tab:blue" if ours else "lightgrey")
        axis.plot([row["ratio_p20"], row["ratio_p80"]], [place, place], color="black", lw=1)
    shapes = [f"{row['provider']}  {' '.join(f'{k}={v}' for k, v in row['shape'].items())} {row['dtype']}" for row in rows]
    axis.set_yticks(range(len(rows)), shapes[::-1], fontsize=7)
    axis.axvline(1, color="black", lw=0.8, ls=":")
    axis.set(xlabel="times as fast as eager (line: p20 to p80 over the rounds)", ylim=(-1, len(rows)))
    return _save(figure, rows[0]["op"], path)


def _roofline(rows: list[dict], path: Path) -> list[Path]:
    figure, (axis,) = _axes(1, height=4.5)
    mine = [row for row in rows if row["provider"] in ("chassis", "eager")]
    ops, xs = list(dict.fromkeys(row["op"] for row in mine)), []
    for row in mine:
        ours = row["provider"] == "chassis"
        xs.append(row["flops"] / row["bytes"])
        axis.plot(
            xs[-1],
            row["flops"] / row["median_ms"] / 1e6,
            MARKERS[ops.index(row["op"]) % len(MARKERS)],
            color="tab:blue" if ours else "grey",
            label=row["op"] if ours else None,
        )
    rates = {row["ceiling"]: row["ceiling_rate"] for row in rows}
    for name, rate in rates.items():
        if name == "copy":
            top = max((r for n, r in rates.items() if n != "copy"), default=max(xs, default=1) * rate)
            axis.plot([min(xs, default=1), top / rate], [min(xs, default=1) * rate / 1e9, top / 1e9], "k:", lw=1)
        else:
            axis.axhline(rate / 1e9, color="black", lw=0.8, ls="--")
            axis.text(min(xs, default=1), rate / 1e9, name, fontsize=7, va="bottom")
    axis.set(xscale="log", yscale="log", xlabel="useful operations a byte", ylabel="useful GFLOP/s")
    _plain(axis.xaxis), _plain(axis.yaxis)
    axis.grid(alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside right upper", fontsize=7)
    return _save(figure, "blue: ours, grey: eager; dashed: measured matrix products, dotted: measured copy", path)


def _axes(number: int, height: float = 3.6):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, number, figsize=(9, height), squeeze=False, layout="constrained")
    return figure, axes[0]


def _save(figure, title: str, path: Path) -> list[Path]:
    import matplotlib.pyplot as plt

    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return [path]
