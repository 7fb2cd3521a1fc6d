"""Tile sizes and launch options of the GPU kernels: data, in chassis_kernels/tuning/<op>.json. Needs no triton.

    {"row_statistics": {"sm_90": {"any": {"BLOCK": 4096, "num_warps": 8, "num_stages": 2}, "32768": {…}},
                        "NVIDIA H200": {"131072": {…}}, …}, …}

reads: kernel -> architecture or device name -> largest size the entry is for, or "any" -> constants of the kernel and
launch options. A device's own table comes before its architecture's, and there the smallest size that is not below the
one at hand before "any". Every kernel has an "any" for each of ARCHITECTURES. Nothing is tried out at run time: a kernel
that writes in place must do on its first call what it does on every other.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "tuning"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter")
OPTIONS = ("num_warps", "num_stages")

Entry = dict[str, int]
Table = dict[str, dict[str, Entry]]  # architecture or device name -> size -> entry


@functools.cache
def tables(op: str) -> dict[str, Table]:
    """The tables of an op's kernels; ValueError, naming file and entry, for what is not as above."""
    path = FOLDER / f"{op}.json"
    if not path.exists():
        raise ValueError(f"{op} has no tuning table: expected {path}")
    try:
        found = json.loads(path.read_text())
        for kernel, table in found.items():
            _check(kernel, table)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return found


def entry(op: str, kernel: str, size: int, device: str, architecture: str) -> Entry:
    """The constants and launch options for a problem of this size on the device named."""
    kernels = tables(op)
    if kernel not in kernels:
        raise ValueError(f"{FOLDER / op}.json has no table for the kernel {kernel}: it has {', '.join(kernels)}")
    table = kernels[kernel]
    for name in (device, _nearest(architecture)):
        sizes = table.get(name, {})
        large_enough = [int(s) for s in sizes if s != "any" and int(s) >= size]
        if large_enough:
            return sizes[str(min(large_enough))]
        if "any" in sizes:
            return sizes["any"]
    raise AssertionError("every architecture has an entry for any size")


def _nearest(architecture: str) -> str:
    """The newest architecture with a table that is not newer than this one, else the oldest of its make."""
    if architecture in ARCHITECTURES:
        return architecture
    if not architecture.startswith("sm_"):
        return "gfx942"
    numbers = sorted(int(a[3:]) for a in ARCHITECTURES if a.startswith("sm_"))
    older = [n for n in numbers if n <= int(architecture[3:])]
    return f"sm_{max(older, default=numbers[0])}"


def _check(kernel: str, table: Table) -> None:
    missing = [a for a in ARCHITECTURES if "any" not in table.get(a, {})]
    if missing:
        raise ValueError(f'{kernel} has no "any" entry for {", ".join(missing)}')
    for device, sizes in table.items():
        for size, values in sizes.items():
            place = f"{kernel}, {device}, {size}"
            if size != "any" and not size.isdecimal():
                raise ValueError(f'{place}: a size is a number or "any"')
            if missing := [name for name in OPTIONS if name not in values]:
                raise ValueError(f"{place} lacks {', '.join(missing)}")
            for name, value in values.items():
                if name not in OPTIONS and not name.isupper():
                    raise ValueError(f"{place}: {name} is neither {' nor '.join(OPTIONS)} nor a constant in capitals")
                power = isinstance(value, int) and value > 0 and (value & (value - 1) == 0 or name == "num_stages")
                if isinstance(value, bool) or not power:
                    raise ValueError(f"{place}: {name} is {value!r}, expected a power of two (num_stages: above 0)")
