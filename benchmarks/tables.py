"""Tables of rows: for the terminal every provider, for the README ours against eager and torch.compile."""

from __future__ import annotations

from benchmarks.cases import DTYPES, OPS

VARIANTS = {"chassis": "", "chassis_reused": ", reused gradient", "chassis_in_place": ", gradient in place"}
HEAD = ("op", "shape", *(f"{dtype}, × eager (× compile)" for dtype in DTYPES), "peak MiB, ours / eager")

# What is replaced, as the README writes it: the op and shape it is measured at, who runs it, and which way of ours instead.
DROP_INS = {
    "`solve(Xc.T @ Xc + lam * I, Xc.T @ Yc)`": ("ridge", "N=4096 D=1024 V=0", "eager", "chassis"),
    "`torch.linalg.lstsq(Xc, Yc).solution`": ("ridge", "N=4096 D=1024 V=0 alpha=0", "torch.linalg.lstsq", "chassis"),
    "`Ridge(lam).fit(X, Y)`": ("ridge", "N=4096 D=1024 V=0", "scikit-learn", "chassis"),
    "`RidgeCV(alphas).fit(X, Y)`": ("ridge_cv", "N=4096 D=256 T=128 alphas=20 form=GCV", "scikit-learn", "chassis"),
    "`IncrementalPCA(k).fit(X)`": ("pca", "N=16384 D=256 k=32", "IncrementalPCA", "chassis_batches"),
    "`torch.cov(X.T, correction=0)`": ("moments", "N=4096 D=2048 T=0 batches=1", "torch.cov", "chassis"),
    "`xx += x.T @ x; xy += x.T @ y`": ("moments", "N=4096 D=2048 T=2048 batches=64", "eager", "chassis"),
    "`logits[:, cols] += ((h - mean) @ U) @ V + c`": (
        "delta_logits",
        "N=64 D=2048 r=128 K=2048 V=32000",
        "eager_indexed",
        "chassis",
    ),
    "`kl_div(log_softmax(h_a @ W_a.T), log_softmax(h_b @ W_b.T))`": (
        "linear_kl",
        "N=512 D=2048 V=32000 r=0",
        "eager",
        "chassis",
    ),
    "an eager cross-tokenizer KL": ("projection_kl", "T=512 V_s=32000 V_t=51200 K=4 k=8192", "eager", "chassis"),
    "`torch.sparse.mm(M.T, softmax(z, 1).T).T.log()`": (
        "bridge_project",
        "N=256 V_E=151936 V_B=128256 K=2",
        "eager",
        "chassis",
    ),
    "`torch.logsumexp(z.float(), 1)`": ("log_sums", "N=512 V=128256", "eager", "chassis"),
}


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


def drop_ins(rows: list[dict]) -> str:
    """One line per entry of DROP_INS whose two sides were timed in float32."""
    timed = {
        (row["op"], _shape(row), row["provider"]): row for row in rows if (row["status"], row["dtype"]) == ("ok", "fp32")
    }
    lines = ["| instead of | measured at | times as fast | error, theirs → ours |", "|" + "---|" * 4]
    for code, (op, shape, *providers) in DROP_INS.items():
        theirs, ours = (timed.get((op, shape, provider)) for provider in providers)
        if theirs and ours:
            ratio, errors = theirs["median_ms"] / ours["median_ms"], f"{theirs['error']:.1e} → {ours['error']:.1e}"
            lines.append(f"| {code} | `{op}` {shape} | {ratio:.1f} | {errors} |")
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
