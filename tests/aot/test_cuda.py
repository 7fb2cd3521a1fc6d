"""CUDA code without a GPU: every kernel of csrc/cuda compiles for every architecture that setup.py builds, within budget."""

import ast
import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
BUDGET = json.loads((ROOT / "tests/aot/budget_cuda.json").read_text())
NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
FACTS = {"stack": r"(\d+) bytes stack frame", "spilled": r"(\d+) bytes spill stores", "registers": r"Used (\d+) registers"}
INSTANCES = {"projection_kl_kernel": 3}  # one for each student dtype

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def architectures() -> dict[str, str]:
    """CUDA_TARGETS of setup.py."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "CUDA_TARGETS":
            return ast.literal_eval(node.value)
    raise AssertionError("setup.py has no CUDA_TARGETS")


def resources(source: Path, code: str, *options: str) -> list[dict]:
    """A row per kernel: what ptxas says it uses. `code` is sm_80 or the like."""
    command = [NVCC, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-gencode=arch={code.replace('sm', 'compute')},code={code}"]
    done = subprocess.run(
        [*command, *options, "-Xptxas", "-v", "-cubin", "-o", os.devnull, source], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = []
    for part in done.stderr.split("Compiling entry function")[1:]:
        kernel = re.search(r"\d([a-z_]+_kernel)", part)[1]
        used = {name: int(re.search(pattern, part)[1]) for name, pattern in FACTS.items()}
        shared = re.search(r"(\d+) bytes smem", part)
        rows.append({"op": source.stem, "kernel": kernel, "code": code, "shared": int(shared[1]) if shared else 0} | used)
    return rows


@pytest.fixture(scope="module")
def compiled():
    jobs = [(source, code) for source in SOURCES for code in architectures().values()]
    with ThreadPoolExecutor(2) as pool:
        return [row for rows in pool.map(lambda job: resources(*job), jobs) for row in rows]


def over_budget(row):
    """Why a row is not within its kernel's budget. Nothing may go to the stack; all shared memory is asked for at launch."""
    limits = BUDGET[row["op"]][row["kernel"]] | {"stack": 0, "spilled": 0, "shared": 0}
    return {name: row[name] for name, limit in limits.items() if row[name] > limit}


def test_every_kernel_is_within_its_budget(compiled):
    assert not [row | {"over": over_budget(row)} for row in compiled if over_budget(row)]


def test_every_kernel_was_compiled_for_every_architecture(compiled):
    for op, kernels in BUDGET.items():
        for kernel in kernels:
            for code in architectures().values():
                found = [row for row in compiled if (row["op"], row["kernel"], row["code"]) == (op, kernel, code)]
                assert len(found) == INSTANCES.get(kernel, 1), (op, kernel, code)


def test_budgets_are_not_far_above_what_is_used(compiled):
    for op, kernels in BUDGET.items():
        for kernel, limits in kernels.items():
            used = [row["registers"] for row in compiled if (row["op"], row["kernel"]) == (op, kernel)]
            assert limits["registers"] <= 1.25 * max(used) + 8, (op, kernel)


def test_a_kernel_that_spills_is_found():
    rows = resources(ROOT / "csrc/cuda/projection_kl.cu", "sm_80", "-DCHASSIS_CUDA_THREADS=1024")
    assert [row for row in rows if {"stack", "spilled"} & set(over_budget(row))]
