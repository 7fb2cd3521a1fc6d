"""The pictures of a report, drawn with matplotlib's Figure objects: no display, no global state."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

NO_OP, CLOSED, REFINED, EXPERT = "#7d8590", "#2f6db5", "#d4652a", "#2b8a57"
KINDS = {"closed form": (CLOSED, "o"), "refined": (REFINED, "D")}
STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.edgecolor": "#b6bcc4",
    "axes.labelcolor": "#333a42",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e9ed",
    "text.color": "#1d2329",
    "xtick.color": "#4b535c",
    "ytick.color": "#4b535c",
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 6.5,
}


def draw_all(results: dict) -> dict[str, bytes]:
    """PNG bytes by name, in reading order; a picture whose data the results lack is left out."""
    drawings: dict[str, Callable[[Axes, dict], bool]] = {
        "kl_by_rank": kl_by_rank,
        "kl_by_layer": kl_by_layer,
        "spectrum": spectrum,
        "refinement": refinement,
        "bits_per_byte": bits_per_byte,
    }
    pictures = {}
    with rc_context(STYLE):
        for name, draw in drawings.items():
            figure = Figure(figsize=(6.6, 2.9 if draw is bits_per_byte else 4.0), dpi=160, layout="constrained")
            figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
            if draw(figure.add_subplot(), results):
                buffer = io.BytesIO()
                figure.savefig(buffer, format="png", facecolor="white")
                pictures[name] = buffer.getvalue()
    return pictures


def kl_by_rank(axes: Axes, results: dict) -> bool:
    """KL against rank, closed form and refined, under the no-op line; the share removed on the right axis."""
    rows = [row for row in results.get("ranks") or [] if _finite(row.get("kl"))]
    if not rows:
        return False
    ranks = sorted({row["rank"] for row in rows})
    for kind, (colour, marker) in KINDS.items():
        curve = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["rank"])
        if not curve:
            continue
        x, y = [row["rank"] for row in curve], [row["kl"] for row in curve]
        axes.errorbar(x, y, _errors(curve), color=colour, marker=marker, capsize=3, label=kind)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.08)
    _no_op_line(axes, results["no_op"]["kl"])
    _share_axis(axes, results["no_op"]["kl"])
    axes.set(title="KL by rank of the adapter", xlabel="rank", ylabel="KL(expert ‖ adapted), nats per token")
    axes.legend(loc="lower left")
    return True


def kl_by_layer(axes: Axes, results: dict) -> bool:
    """KL of the lens at each layer, the final space last, under the no-op line."""
    layers = [row for row in results.get("layers") or [] if _finite(row.get("kl"))]
    if len(layers) < 2:
        return False
    x = range(len(layers))
    axes.errorbar(x, [row["kl"] for row in layers], _errors(layers), color=CLOSED, marker="o", capsize=3)
    step = math.ceil(len(layers) / 12)
    ticks = [i for i in x if i % step == 0 and i < len(layers) - max(1, step // 2)] + [len(layers) - 1]
    axes.set_xticks(ticks, [_layer_label(layers[i]) for i in ticks])
    axes.margins(x=0.06)
    _no_op_line(axes, results["no_op"]["kl"])
    axes.set(title="KL of the lens at each layer", xlabel="layer", ylabel="KL(expert ‖ lens), nats per token")
    return True


def spectrum(axes: Axes, results: dict) -> bool:
    """Nats explained by each direction, and where the adapter's rank cuts."""
    values = [value for value in results.get("spectrum") or [] if _finite(value) and value > 0]
    rank = results.get("rank") or 0
    if not values:
        return False
    x = range(1, len(values) + 1)
    axes.fill_between(x, values, min(values), where=[i <= rank for i in x], color=CLOSED, alpha=0.13, linewidth=0)
    axes.plot(x, values, color=CLOSED, marker="o" if len(values) <= 40 else "", markersize=4)
    axes.set_yscale("log")
    axes.set_xlim(0, len(values) + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if 0 < rank <= len(values):
        share = sum(values[:rank]) / sum(values)
        axes.axvline(rank, color=NO_OP, linewidth=1.2, linestyle=(0, (4, 3)))
        near_right = rank > 0.6 * len(values)
        axes.annotate(
            f"rank {rank}: {share * 100:.0f} % of the sum",
            (rank, 0.96),
            xycoords=axes.get_xaxis_transform(),
            xytext=(-7 if near_right else 7, 0),
            textcoords="offset points",
            ha="right" if near_right else "left",
            va="top",
        )
    axes.set(title="Spectrum of the full-rank change", xlabel="direction", ylabel="nats explained")
    return True


def refinement(axes: Axes, results: dict) -> bool:
    """KL on the fit batches and on validation documents while refining."""
    history = results.get("refinement")
    if not history or not history.get("steps"):
        return False
    train = [(s["step"], s["train_kl"]) for s in history["steps"] if _finite(s.get("train_kl"))]
    held_out = [(s["step"], s["validation_kl"]) for s in history["steps"] if _finite(s.get("validation_kl"))]
    if train:
        axes.plot(*zip(*train, strict=True), color=REFINED, alpha=0.35, linewidth=1.4, label="batch it is fitted on")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=REFINED, marker="D", label="validation documents")
    level = history.get("closed_form_validation_kl")
    if _finite(level):
        axes.axhline(level, color=CLOSED, linewidth=1.4, linestyle=(0, (4, 3)), label="closed form, validation")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    _no_op_line(axes, history.get("no_op_validation_kl"))
    axes.set(title="Refinement", xlabel="step", ylabel="KL(expert ‖ adapted), nats per token")
    axes.legend(loc="best")
    return True


def bits_per_byte(axes: Axes, results: dict) -> bool:
    """Bits per byte of base, adapted and expert on the same held-out text."""
    scores = results.get("bits_per_byte") or {}
    names = [name for name in ("base", "adapted", "expert") if _finite(scores.get(name))]
    if not names:
        return False
    values = [scores[name] for name in names]
    colours = {"base": NO_OP, "adapted": REFINED if results.get("refined") else CLOSED, "expert": EXPERT}
    bars = axes.barh(names, values, color=[colours[name] for name in names], height=0.62)
    axes.bar_label(bars, [f"{value:.3f}" for value in values], padding=6, fontweight="bold")
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.12)
    axes.grid(False)
    axes.tick_params(axis="y", length=0)
    gap = scores.get("gap_closed")
    closed = f": {gap * 100:.0f} % of the gap closed" if _finite(gap) else ""
    axes.set(title=f"Bits per byte on held-out text{closed}", xlabel="bits per byte (lower is better)")
    return True


def _no_op_line(axes: Axes, level: float | None) -> None:
    """The line every KL is read against; the axis starts at zero so that shares can be seen."""
    if not _finite(level):
        axes.set_ylim(bottom=0)
        return
    axes.set_ylim(0, max(axes.get_ylim()[1], level * 1.14))
    axes.axhline(level, color=NO_OP, linewidth=1.6, linestyle=(0, (5, 3)))
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "xytext": (-2, 4)}
    axes.annotate(f"no-op (base as it is): {level:.3f}", (1, level), ha="right", va="bottom", color="#5b636d", **place)


def _share_axis(axes: Axes, no_op: float | None) -> None:
    if not _finite(no_op) or no_op <= 0:
        return
    right = axes.secondary_yaxis("right", functions=(lambda kl: 1 - kl / no_op, lambda share: (1 - share) * no_op))
    right.set_ylabel("share of the no-op KL removed")
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    right.spines["right"].set_visible(False)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2f}"))


def _layer_label(row: dict) -> str:
    return "final" if row.get("name") == "final" else str(row["layer"])


def _errors(rows: list[dict]) -> list[float]:
    return [row["stderr"] if _finite(row.get("stderr")) else 0.0 for row in rows]


def _finite(value: float | None) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
