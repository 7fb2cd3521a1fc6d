"""Check, then time, the ops of chassis_kernels against what one would write without them.

python benchmarks/run.py --op moments                       a table
python benchmarks/run.py --op projection_kl --json          one JSON row a line (measure.FIELDS)
python benchmarks/run.py --quick --out results/quick.jsonl --plot
python benchmarks/run.py --rows results/quick.jsonl --table   Markdown of rows that are there, nothing measured
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # in place of this folder, where files bear libraries' names

import torch  # noqa: E402

from benchmarks.cases import DTYPES, OPS, cases  # noqa: E402
from benchmarks.measure import measure  # noqa: E402
from benchmarks.tables import drop_ins, markdown, table  # noqa: E402

LEVEL_HELP = {
    "tiny": "seconds",
    "quick": "a minute",
    "scaling": "small shapes that differ in one size; torch.compile only if --providers names it",
    "full": "the default sizes and --scaling",
    "gpu": "sizes for a GPU",
}


def rows_of(
    ops: tuple[str, ...] = OPS,
    *,
    level: str = "default",
    dtypes: tuple[str, ...] = tuple(DTYPES),
    providers: tuple[str, ...] | None = None,
    rounds: int | None = None,
    minutes: float = float("inf"),
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[dict]:
    """The rows of all cases, on the GPU where there is one; no case is begun once `minutes` have passed.

    The ops take turns, so that a limit leaves every op its first cases. On a GPU "quick" means the default sizes, as the
    quick ones would time the launches. Raises ValueError for an op or level that is not there.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds = rounds or {"tiny": 3, "quick": 3, "scaling": 5}.get(level, 9)
    without = ("compile",) if level == "scaling" and providers is None else ()  # compiling takes longer than all the rest
    if level == "quick" and device == "cuda":
        level = "default"
    turns = zip_longest(*(cases(op, level, dtypes) for op in ops))
    todo = [case for turn in turns for case in turn if case is not None]
    started = time.monotonic()
    for number, case in enumerate(todo):
        if time.monotonic() - started > 60 * minutes:
            print(f"{minutes:g} minutes are over: {len(todo) - number} of {len(todo)} cases left out", file=sys.stderr)
            return
        yield from measure(case, device=device, rounds=rounds, providers=providers, without=without)
        if progress:
            progress("bench", number + 1, len(todo))


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 if a provider of ours failed its gate (a peer's failure is a row and a line)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=OPS, help="may be repeated; by default all")
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="by default both")
    parser.add_argument("--providers", help="names with commas between; eager always runs")
    parser.add_argument("--rounds", type=int, help="timed rounds: 9, with --quick 3, with --scaling 5")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case after this many minutes")
    parser.add_argument("--json", action="store_true", help="one JSON row a line")
    parser.add_argument("--out", type=Path, help="also write the rows here, a .jsonl file")
    parser.add_argument("--rows", action="append", type=Path, help="rows from this .jsonl file; of equals the last counts")
    parser.add_argument("--table", action="store_true", help="print the README's Markdown table")
    parser.add_argument("--drop-ins", action="store_true", help="print the README's figures of its drop-ins")
    parser.add_argument("--plot", action="store_true", help="write PNGs next to --out, or into benchmarks/results")
    size = parser.add_mutually_exclusive_group()
    for level, what in LEVEL_HELP.items():
        size.add_argument(f"--{level}", dest="level", action="store_const", const=level, default="default", help=what)
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="torch._dynamo")  # what it cannot trace, it runs as eager does
    rows, source = [], _stored(given.rows) if given.rows else _measured(given)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text("")
    for row in source:
        rows.append(row)
        line = json.dumps(row)
        if given.json:
            print(line, flush=True)
        if given.out:
            with given.out.open("a") as file:
                file.write(line + "\n")
    if given.table:
        print(markdown(rows))
    if given.drop_ins:
        print(drop_ins(rows))
    if not (given.table or given.drop_ins or given.json):
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 160).print(table(rows))
    if given.plot:
        _plot(rows, given.out or (given.rows or [None])[0] or Path(__file__).parent / "results" / "bench.jsonl")
    return 1 if any(row["status"] == "failed" and row["provider"].startswith("chassis") for row in rows) else 0


def _measured(given: argparse.Namespace) -> Iterator[dict]:
    return rows_of(
        tuple(given.op or OPS),
        level=given.level,
        dtypes=tuple(given.dtype or DTYPES),
        providers=tuple(given.providers.split(",")) if given.providers else None,
        rounds=given.rounds,
        minutes=given.minutes,
    )


def _stored(paths: list[Path]) -> list[dict]:
    """The rows of the files; where they hold the same op, shape, dtype and provider, the last."""
    rows = (json.loads(line) for path in paths for line in path.read_text().splitlines())
    return list({(row["op"], str(row["shape"]), row["dtype"], row["provider"]): row for row in rows}.values())


def _plot(rows: list[dict], out: Path) -> None:
    from benchmarks.plots import plot

    try:
        for path in plot(rows, out):
            print(f"wrote {path}", file=sys.stderr)
    except ImportError as error:
        print(f"no pictures: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
