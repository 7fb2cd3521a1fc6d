"""GPU code without a GPU: every Triton kernel compiles for every architecture and shipped tuning entry, within budget."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chassis_kernels import backends
from chassis_kernels.triton import tuning

HERE = Path(__file__).parent
BUDGET = json.loads((HERE / "budget.json").read_text())
PROCESSES = 2

pytestmark = pytest.mark.skipif(not backends.have_triton(), reason="triton is not installed")


def start(*arguments):
    """Python in a process of its own where Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=HERE, env=environment, text=True, stdout=-1, stderr=-1
    )


@pytest.fixture(scope="module")
def compiled():
    """What the compilers said of each kernel, architecture, tuning entry and dtype."""
    rows = []
    for process in [start("compile_kernels.py", part, PROCESSES) for part in range(PROCESSES)]:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        rows += map(json.loads, out.splitlines())
    return rows


def over_budget(row):
    """Why a row is not within its kernel's budget; nothing is ever allowed on the stack."""
    limits = BUDGET[row["op"]][row["kernel"]] | {"stack": 0}
    return {name: row[name] for name, limit in limits.items() if row[name] > limit}


def test_every_kernel_is_within_its_budget(compiled):
    assert not [row | {"over": over_budget(row)} for row in compiled if over_budget(row)]


def test_no_kernel_calculates_in_double_precision_unasked(compiled):
    """Python floats are float32 arguments: one taken for a double would slow every line that it touches. Moments are kept in
    double precision, and their budgets say so."""
    assert not [row for row in compiled if row["fp64"] and not BUDGET[row["op"]][row["kernel"]].get("fp64")]


def test_budgets_are_not_far_above_what_is_used(compiled):
    for op, kernels in BUDGET.items():
        for kernel, limits in kernels.items():
            rows = [row for row in compiled if (row["op"], row["kernel"]) == (op, kernel)]
            assert rows, f"{op}.{kernel} is in budget.json, but was not compiled"
            assert limits["registers"] <= 1.25 * max(row["registers"] for row in rows) + 8, (op, kernel)


def test_every_tuning_entry_was_compiled(compiled):
    done = {(row["op"], row["kernel"], json.dumps(row["entry"], sort_keys=True)) for row in compiled}
    for path in tuning.FOLDER.glob("*.json"):
        for kernel, table in tuning.tables(path.stem).items():
            for device, sizes in table.items():
                for size, entry in sizes.items():
                    found = (path.stem, kernel, json.dumps(entry, sort_keys=True)) in done
                    assert found or device == "interpreter", (path.stem, kernel, device, size)


def test_every_dtype_and_architecture_was_compiled(compiled):
    for op in {row["op"] for row in compiled}:
        types = " ".join(row["types"] for row in compiled if row["op"] == op)
        assert all(f"*{name}" in types for name in ("fp32", "bf16", "fp16")), op
        assert {row["architecture"] for row in compiled if row["op"] == op} == set(tuning.ARCHITECTURES) - {"interpreter"}


SPILLING = """
import json
import compile_kernels as c
entry = {"ROWS": 32, "BLOCK": 4096, "num_warps": 4, "num_stages": 1}
c.tuning.tables = lambda op: {k: dict.fromkeys(c.tuning.ARCHITECTURES, {"any": entry}) for k in ("column_maxima",)}
c.backends.OPS = {"top_columns": c.backends.OPS["top_columns"]}
for key, row, made, architecture, options in c.jobs():
    if row["types"].startswith("*fp32") and row["aligned"]:
        compiled = c.triton.compile(made, target=c.TARGETS[architecture], options=options)
        print(json.dumps(row | c.resources(compiled, architecture)), flush=True)
"""


def test_a_kernel_that_spills_is_found():
    out, errors = start("-c", SPILLING).communicate(timeout=300)
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 4, errors[-3000:]
    assert all(over_budget(row) for row in rows)
    assert {row["architecture"] for row in rows if "stack" in over_budget(row)} >= {"sm_80", "sm_90", "sm_100"}
