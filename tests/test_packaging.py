"""What is shipped: metadata, pins, source and wheel, and an installation without a compiler."""

import ast
import importlib
import importlib.metadata
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import chassis
import pytest
from packaging.requirements import Requirement

import chassis_kernels

ROOT = Path(__file__).parents[1]
TOP = ("chassis_kernels", "csrc", "python", "tests", "Makefile", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE",
       "constraints.txt", "pyproject.toml", "setup.py")  # fmt: skip
BROKEN = {"CXX": "/bin/false"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources without anything built, so that builds here leave the checkout alone."""
    pytest.importorskip("build")
    pytest.importorskip("pybind11")
    copy = tmp_path_factory.mktemp("tree")
    skip = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in TOP:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=skip)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(tree):
    """The wheel as it comes out where no compiler works."""
    run(tree, "-m", "build", "--wheel", "--no-isolation", ".", env=BROKEN)
    return next((tree / "dist").glob("*.whl"))


def run(folder, *arguments, env=None, check=True):
    """Python with these arguments, in `folder`, the paths of this process not inherited."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CHASSIS_REQUIRE_EXTENSION", "CHASSIS_BACKEND")}
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, env=clean | (env or {}), capture_output=True, text=True, timeout=300)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def requirements(extra: str = "") -> dict[str, Requirement]:
    given = [Requirement(line) for line in importlib.metadata.requires("chassis-kernels")]
    return {r.name: r for r in given if ("extra" in str(r.marker or "")) == bool(extra) and extra in str(r.marker or "")}


def test_version_is_the_distribution_s():
    assert chassis.__version__ == importlib.metadata.version("chassis-kernels")


def test_ranges_and_extras_are_declared():
    core = requirements()
    assert core["torch"].specifier.contains("2.11.0") and not core["torch"].specifier.contains("2.10.0")
    assert core["transformers"].specifier.contains("5.0.0") and not core["transformers"].specifier.contains("4.57.0")
    assert requirements("gpu")["triton"].specifier.contains("3.6.0") and "triton" not in core
    metadata = importlib.metadata.metadata("chassis-kernels")
    assert {"distill", "bench", "dev", "gpu"} <= set(metadata.get_all("Provides-Extra"))
    assert metadata["Requires-Python"] == ">=3.10"
    scripts = importlib.metadata.distribution("chassis-kernels").entry_points
    assert [(script.name, script.value) for script in scripts] == [("chassis", "chassis.cli:main")]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_pins_lie_within_the_ranges(python):
    """And leave triton to torch, whose builds each ask for one version of it."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = [pin for pin in pins if not pin.marker or pin.marker.evaluate({"python_version": python})]
    versions = {pin.name: next(iter(pin.specifier)).version for pin in here}
    assert len(versions) == len(here) and "triton" not in versions and versions["torch"] == "2.13.0"
    pinned = requirements() | {name: r for name, r in requirements("dev").items() if name != "triton"}
    for name, requirement in pinned.items():
        assert requirement.specifier.contains(versions[name]), requirement


def test_every_module_imports():
    """With the oldest and the newest torch and Triton too: `make test-versions`."""
    pytest.importorskip("triton")
    names = [found.name for p in (chassis, chassis_kernels) for found in pkgutil.walk_packages(p.__path__, f"{p.__name__}.")]
    assert {"chassis_kernels.triton.moments", "chassis.distill.trainer", "chassis.cli.using"} <= set(names)
    for name in names:
        importlib.import_module(name)


def test_the_oldest_versions_that_are_tried_are_the_oldest_that_are_declared():
    script = (ROOT / ".ci" / "versions").read_text()
    for name, requirement in (("torch", requirements()["torch"]), ("triton", requirements("gpu")["triton"])):
        least = next(clause.version for clause in requirement.specifier if clause.operator == ">=")
        assert re.search(rf"^check oldest .*\b{name}=={re.escape(least)}(\.0)*\s", script, re.MULTILINE)


def test_kernels_import_without_chassis():
    """Arrows point one way: the ops need torch, and nothing of the package above them."""
    for path in (ROOT / "chassis_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] in ("chassis", "transformers")], path


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and script.read_text().rstrip().endswith("make test")


def test_sdist_holds_what_a_build_needs(tree):
    run(tree, "-m", "build", "--sdist", "--no-isolation", ".")
    with tarfile.open(next((tree / "dist").glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = [p.relative_to(tree).as_posix() for p in (tree / "csrc").rglob("*") if p.is_file()]
    needed = {"setup.py", "pyproject.toml", "constraints.txt", "LICENSE", "README.md", "CHANGELOG.md", "Makefile"}
    assert needed | set(sources) | {"python/chassis/assets/report.html", "tests/conftest.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_without_a_compiler_runs_on_the_reference(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    assert {"chassis/cli/__init__.py", "chassis/assets/report.html", "chassis_kernels/reference/moments.py"} <= set(names)
    assert not [name for name in names if name.endswith(".so")]
    path = [str(tmp_path), *(folder for folder in sys.path if folder.endswith("site-packages"))]
    program = (
        f"import sys; sys.path[:0] = {path}; "  # -S leaves out the editable installation of the checkout
        "import json, torch, chassis, chassis_kernels; from chassis.doctor import examine; "
        "logits = chassis_kernels.delta_logits_(torch.zeros(2, 5), *map(torch.ones, ((2, 3), (3, 1), (1, 5)))); "
        "print(json.dumps([chassis.__file__, float(logits.sum()), examine()]))"
    )
    result = run(tmp_path, "-S", "-c", program, env=BROKEN)
    place, total, findings = json.loads(result.stdout)
    assert place.startswith(str(tmp_path)) and total == 30
    executed = {(row["op"], row["backend"]) for row in findings["capabilities"] if row["executed"]}
    assert ("delta_logits_", "reference") in executed and "cpu" not in {backend for _, backend in executed}
    assert "no C++17 compiler" in findings["hints"][0] and "pip install" in findings["hints"][1]


def test_a_required_extension_that_fails_stops_the_build(tree):
    result = run(tree, "setup.py", "-q", "build_ext", env=BROKEN | {"CHASSIS_REQUIRE_EXTENSION": "1"}, check=False)
    assert result.returncode != 0 and "chassis_kernels._C was not built with '/bin/false'" in result.stderr


def test_a_cuda_extension_that_was_asked_for_and_fails_stops_the_build(tree):
    result = run(tree, "setup.py", "-q", "build_ext", env=BROKEN | {"CHASSIS_BUILD_CUDA": "1"}, check=False)
    assert result.returncode != 0 and "chassis_kernels._CUDA was not built with '/bin/false' and" in result.stderr
