"""Builds `chassis_kernels._C` and `chassis_kernels._CUDA` with pybind11 and ninja.

`_C`: each CPU op once per instruction set, chosen at run time. `_CUDA`: the CUDA kernels for each architecture, where nvcc
and a torch for CUDA are found; CHASSIS_BUILD_CUDA=1 builds it without such a torch, CHASSIS_BUILD_CUDA=0 leaves it out.

The sources use neither torch nor its headers (tensors arrive as pointers), so one build serves every torch version
and the build environment needs no torch. Without a working compiler the package installs without them, and
`chassis doctor` says so; CHASSIS_REQUIRE_EXTENSION=1 and CHASSIS_BUILD_CUDA=1 make that an error.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
KERNELS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc/cpu").glob("*.cpp"))
CUDA_KERNELS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc/cuda").glob("*.cu"))
HEADERS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.h"))


def instruction_sets() -> dict[str, str]:
    """Name of each variant compiled for this processor family -> its compiler flags."""
    variants = {"portable": ""}
    if platform.machine().lower() in ("x86_64", "amd64"):
        variants["avx2"] = "-mavx2 -mfma -mf16c"
        variants["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c"
    return variants


# Machine code for each, and PTX of the last for what comes after it.
CUDA_TARGETS = {"80": "sm_80", "90a": "sm_90a", "100": "sm_100"}


def find_nvcc() -> str | None:
    """Path of nvcc: $CUDA_HOME's, the first on PATH, or the usual place."""
    known = [Path(os.environ["CUDA_HOME"], "bin")] if os.environ.get("CUDA_HOME") else []
    path = os.pathsep.join(map(str, [*known, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    return shutil.which("nvcc", path=path)


def wants_cuda() -> bool:
    if asked := os.environ.get("CHASSIS_BUILD_CUDA"):
        return asked != "0"
    if find_nvcc() is None:
        return False
    try:
        import torch
    except ImportError:
        return False
    return torch.version.cuda is not None


class NinjaBuild(build_ext):
    """Writes one build.ninja for the extensions and lets ninja compile what changed."""

    def run(self) -> None:
        self.into_source = bool(self.inplace or self.editable_mode)  # setuptools resets `inplace` while it builds
        if self.into_source and not any(ext.name.endswith("_CUDA") for ext in self.extensions):
            for left in (ROOT / "chassis_kernels").glob("_CUDA.*.so"):  # from other sources, perhaps
                left.unlink()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        # A fixed place, so that `pip install -e .` and `build_ext --inplace` share what is compiled already.
        folder = ROOT.resolve() / "build/ninja" if self.into_source else Path(self.build_temp).resolve() / "ninja"
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CXX") or "c++"
        nvcc = find_nvcc() or "nvcc"
        self._write(folder / "build.ninja", compiler, nvcc)
        verbose = ["-v"] if self.verbose > 1 else []
        try:
            subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder), *verbose, str(target)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            # An extension left from an earlier build would run in place of the sources that just failed.
            for folder in [target.parent] + self.into_source * [ROOT / "chassis_kernels"]:
                (folder / target.name).unlink(missing_ok=True)
            tools, needed = repr(compiler), "a C++17 compiler and Python's headers, or name a compiler in CXX"
            if ext.name.endswith("_CUDA"):
                tools, needed = (
                    f"{compiler!r} and {nvcc!r}",
                    f"{needed}, and CUDA 13's nvcc, or name its folder in CUDA_HOME",
                )
            raise CompileError(
                f"{ext.name} was not built with {tools}: see the compiler's output above. Install {needed}"
            ) from error

    def _write(self, path: Path, compiler: str, nvcc: str) -> None:
        import pybind11
        from ninja import ninja_syntax

        includes = [ROOT.resolve() / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
        openmp = "" if sys.platform == "darwin" else "-fopenmp"
        flags = f"-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall {openmp}"
        flags += "".join(f' "-I{path}"' for path in includes)
        variants = instruction_sets()
        with open(path, "w") as file:
            writer = ninja_syntax.Writer(file)
            writer.rule(
                "cxx",
                command=f"{compiler} -MMD -MF $out.d {flags} $isa -c $in -o $out",
                description="compile $out",
                depfile="$out.d",
                deps="gcc",
            )
            shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else f"-shared {openmp}"
            writer.rule("link", command=f"{compiler} {shared} $in -o $out", description="link $out")
            objects = []
            for name, isa in variants.items():
                for source in KERNELS:
                    objects.append(f"{Path(source).stem}.{name}.o")
                    writer.build(objects[-1], "cxx", absolute(source), variables={"isa": f"{isa} -DCHASSIS_ISA={name}"})
            objects.append("bindings.o")
            known = " ".join(f"-DCHASSIS_HAVE_{name.upper()}" for name in variants)
            writer.build(objects[-1], "cxx", absolute("csrc/bindings.cpp"), variables={"isa": known})
            writer.build(self._target("_C"), "link", objects)

            machine = "".join(f" -gencode arch=compute_{name},code={code}" for name, code in CUDA_TARGETS.items())
            newest = list(CUDA_TARGETS)[-1]
            machine += f" -gencode arch=compute_{newest},code=compute_{newest}"
            host = "-Xcompiler -fPIC,-fvisibility=hidden"
            writer.rule(
                "nvcc",
                command=f'{nvcc} -ccbin {compiler} -MMD -MF $out.d -std=c++17 -O3 "-I{includes[0]}" {host}{machine} '
                "--threads 0 -c $in -o $out",
                description="compile $out",
                depfile="$out.d",
                deps="gcc",
            )
            writer.rule("nvlink", command=f"{nvcc} -ccbin {compiler} -shared $in -o $out", description="link $out")
            objects = [f"{Path(source).stem}.cuda.o" for source in CUDA_KERNELS]
            for name, source in zip(objects, CUDA_KERNELS, strict=True):
                writer.build(name, "nvcc", absolute(source))
            objects.append("bindings.cuda.o")
            writer.build(objects[-1], "cxx", absolute("csrc/cuda/bindings.cpp"))
            writer.build(self._target("_CUDA"), "nvlink", objects)

    def _target(self, name: str) -> str:
        return str(Path(self.get_ext_fullpath(f"chassis_kernels.{name}")).resolve())


def absolute(source: str) -> str:
    return str((ROOT / source).resolve())


def extensions() -> list[Extension]:
    required, cuda = (os.environ.get(f"CHASSIS_{name}") == "1" for name in ("REQUIRE_EXTENSION", "BUILD_CUDA"))
    cpu_sources, cuda_sources = ["csrc/bindings.cpp", *KERNELS], ["csrc/cuda/bindings.cpp", *CUDA_KERNELS]
    found = [Extension("chassis_kernels._C", sources=cpu_sources, depends=HEADERS, optional=not required)]
    if wants_cuda():
        found.append(Extension("chassis_kernels._CUDA", sources=cuda_sources, depends=HEADERS, optional=not cuda))
    return found


setup(
    packages=find_packages(include=["chassis_kernels*"]) + find_packages("python"),
    package_dir={"chassis": "python/chassis"},
    package_data={"chassis_kernels": ["tuning/*.json"], "chassis": ["assets/*"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild},
)
