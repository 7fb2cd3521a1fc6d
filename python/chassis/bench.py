"""`chassis bench`: the harness of the source tree's benchmarks/, at its quick sizes, ours against eager PyTorch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from chassis.errors import ChassisError

ROOT = Path(__file__).resolve().parents[2]
PROVIDERS = ("chassis", "chassis_reused", "chassis_in_place", "eager", "eager_in_place")


def bench(op: str | None = None, *, rounds: int = 7, progress: Callable[[str, int, int], None] | None = None) -> list[dict]:
    """The harness's rows (benchmarks/results/README.md has the fields) for one op or for all, in float32 and bfloat16.

    Raises ChassisError for an op that has no case, for a result that is wrong, and without a source tree.
    """
    run = harness()
    ops = run.OPS if op is None else (op.rstrip("_"),)
    if not set(ops) <= set(run.OPS):
        raise ChassisError(f"no benchmark of {op!r}: expected one of {', '.join(run.OPS)}")
    rows = []
    for row in run.rows_of(ops, level="quick", rounds=rounds, providers=PROVIDERS, progress=progress):
        if row["status"] == "failed":
            raise ChassisError(f"{row['op']} by {row['provider']} is not timed at {row['shape']}: {row['reason']}")
        rows.append(row)
    return rows


def harness() -> ModuleType:
    """benchmarks/run.py of the source tree this package was installed from."""
    if not (ROOT / "benchmarks" / "run.py").is_file():
        raise ChassisError(
            "the benchmarks are in the source tree alone: clone it, `pip install -e .` there, and run this again"
        )
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return importlib.import_module("benchmarks.run")
