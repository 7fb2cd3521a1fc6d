"""What is installed, what runs on this machine, and what to do about the rest.

Every op and backend is tried with a small example: "ran" means that it just did, with the reference's result.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy")
OPTIONAL = {"triton": "gpu", "accelerate": "distill", "peft": "dev"}  # package -> the extra that brings it


def examine() -> dict:
    """{"environment": {name: text}, "capabilities": [row of backends.capabilities()], "hints": [text]}, JSON-ready."""
    capabilities, hints = _capabilities()
    found = environment()
    hints += _hints(found, capabilities)
    return {"environment": found, "capabilities": capabilities, "hints": hints}


def environment() -> dict[str, str | int | None]:
    """Versions, threads, processor, GPU, compiler and folders; None for what is not there."""
    import torch

    from chassis.testbed import cache_folder
    from chassis_kernels import backends

    versions = {name: _version(name) for name in (*PACKAGES, *OPTIONAL)}
    return {
        "chassis": _version("chassis-kernels"),
        "python": platform.python_version(),
        **versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu extension": "built" if backends._C else None,
        "cpu_isa": _cpu_isa(),
        "gpu": _gpu(),
        "cuda extension": "built" if backends._CUDA else None,
        "nvcc": _nvcc(),
        "compiler": _compiler(),
        "python headers": _headers(),
        "cache": str(cache_folder().parents[1]),
    }


def print_findings(findings: dict, console) -> None:
    """The two tables and the hints, on a rich console."""
    import rich.box
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Environment", title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD, show_header=False)
    for name, value in findings["environment"].items():
        table.add_row(name, Text("–", "dim") if value is None else Text(str(value)))
    console.print(table)
    table = Table(title="Ops by backend", title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD)
    cells = {(row["op"], row["backend"]): _cell(row) for row in findings["capabilities"]}
    backends = list(dict.fromkeys(backend for _, backend in cells))
    for column in ("op", *backends):
        table.add_column(column, no_wrap=True)
    for op in dict.fromkeys(op for op, _ in cells):
        table.add_row(op, *(cells.get((op, backend), Text("–", "dim")) for backend in backends))
    console.print(table)
    console.print(
        Text("ran: here, just now, and as the reference. *: no GPU has run it yet; only an override chooses it", "dim")
    )
    for backend, note in dict.fromkeys((r["backend"], r["note"]) for r in findings["capabilities"] if r["note"]):
        console.print(Text(f"{backend}: {note}", "dim"), soft_wrap=True)
    for hint in findings["hints"]:
        console.print(Text("→ ", "yellow bold") + Text(hint), soft_wrap=True)
    if not findings["hints"]:
        console.print(Text("Nothing is missing.", "green"))


def _cell(row: dict):
    """What happened here to one op on one backend."""
    from rich.text import Text

    from chassis_kernels.backends import UNVERIFIED

    state, style = ("ran", "green") if row["executed"] else ("built", "yellow") if row["built"] else ("not built", "dim")
    if row["interpreted"]:
        state, style = "interpreted", "yellow"
    return Text(state + "*" * (row["verified"] == UNVERIFIED), style)


def _capabilities() -> tuple[list[dict], list[str]]:
    import chassis_kernels  # noqa: F401  registers the ops
    from chassis_kernels import backends

    try:
        return backends.capabilities(), []
    except Exception as error:  # a doctor that falls ill with its patient helps nobody
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return [], [f"the self-check of the ops failed ({reason}); reinstall chassis-kernels against this torch"]


def _hints(found: dict, capabilities: list[dict]) -> list[str]:
    hints = []
    if found["cpu extension"] is None:
        if not found["compiler"]:
            hints.append(f"no C++17 compiler: the ops run on the slower reference backend. {_install_compiler()}")
        elif not found["python headers"]:
            hints.append("Python.h is missing: install your Python's development package (python3-dev or python3-devel)")
        else:
            hints.append("the C++ extension is not built although a compiler is there")
        hints.append(
            "then build it: `make` in a checkout, or `CHASSIS_REQUIRE_EXTENSION=1 pip install --force-reinstall --no-deps` "
            "with the path of the source, which stops with the compiler's message if it fails"
        )
    if found["gpu"] and not found["cuda extension"]:
        do = "`CHASSIS_BUILD_CUDA=1 pip install --force-reinstall --no-deps` with the path of the source says why"
        if not found["nvcc"]:
            do = "install the CUDA toolkit, or name its folder in CUDA_HOME, and install chassis-kernels again"
        hints.append(f"a GPU, but the CUDA extension is not built: {do}")
    if found["gpu"] and not found["triton"]:
        hints.append("a GPU but no triton: `pip install 'chassis-kernels[gpu]'`")
    failed = [r for r in capabilities if r["built"] and not r["executed"] and r["backend"] in ("reference", "cpu")]
    hints += [f"{row['op']} on {row['backend']} did not run: {row['note']}" for row in failed]
    if not _writable(Path(found["cache"])):
        hints.append(f"the cache {found['cache']} cannot be written: set CHASSIS_CACHE to a folder you may write to")
    return hints


def _cpu_isa() -> str | None:
    from chassis_kernels import backends

    try:
        return backends.cpu_isa() if backends._C else None
    except RuntimeError as error:  # CHASSIS_CPU_ISA asks for one that is not there
        return f"none: {error}"


def _install_compiler() -> str:
    if sys.platform == "darwin":
        return "Install one with `xcode-select --install`."
    known = {"apt-get": "apt-get install g++", "dnf": "dnf install gcc-c++", "apk": "apk add g++", "pacman": "pacman -S gcc"}
    for tool, command in known.items():
        if shutil.which(tool):
            return f"Install one with `{command}` (as root)."
    return "Install g++ or clang++ with your system's package manager."


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpu() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor}, {memory:.0f} GiB), CUDA {torch.version.cuda}"


def _compiler() -> str | None:
    """First line of `$CXX --version` (or c++), if it can be run."""
    return _printed(os.environ.get("CXX") or "c++", 0)


def _nvcc() -> str | None:
    """The release that `nvcc --version` tells in its last line but one, from where setup.py looks for it."""
    home = [os.path.join(os.environ["CUDA_HOME"], "bin")] if os.environ.get("CUDA_HOME") else []
    found = shutil.which("nvcc", path=os.pathsep.join([*home, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    return found and _printed(shlex.quote(found), -2)


def _printed(compiler: str, line: int) -> str | None:
    """That line of what `compiler --version` prints, if it can be run."""
    try:
        command = [*shlex.split(compiler), "--version"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return (result.stdout.splitlines() or [command[0]])[line]


def _headers() -> str | None:
    path = Path(sysconfig.get_path("include"), "Python.h")
    return str(path.parent) if path.exists() else None


def _writable(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
