"""Builds `chassis_kernels._C` with pybind11 and ninja: each CPU op once per instruction set, chosen at run time.

The sources use neither torch nor its headers (tensors arrive as pointers), so one build serves every torch version
and the build environment needs no torch. Without a working compiler the package installs without `_C`, and
`chassis doctor` says so; set CHASSIS_REQUIRE_EXTENSION=1 to make that an error.
"""

import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
KERNELS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc/cpu").glob("*.cpp"))
HEADERS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.h"))


def instruction_sets() -> dict[str, str]:
    """Name of each variant compiled for this processor family -> its compiler flags."""
    variants = {"portable": ""}
    if platform.machine().lower() in ("x86_64", "amd64"):
        variants["avx2"] = "-mavx2 -mfma -mf16c"
        variants["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c"
    return variants


class NinjaBuild(build_ext):
    """Writes one build.ninja for the extension and lets ninja compile what changed."""

    def run(self) -> None:
        self.into_source = bool(self.inplace or self.editable_mode)  # setuptools resets `inplace` while it builds
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import pybind11
        from ninja import ninja_syntax

        # A fixed place, so that `pip install -e .` and `build_ext --inplace` share what is compiled already.
        folder = ROOT.resolve() / "build/ninja" if self.into_source else Path(self.build_temp).resolve() / "ninja"
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [ROOT.resolve() / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
        compiler = os.environ.get("CXX") or "c++"
        openmp = "" if sys.platform == "darwin" else "-fopenmp"
        flags = f"-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall {openmp}"
        flags += "".join(f' "-I{path}"' for path in includes)
        variants = instruction_sets()
        with open(folder / "build.ninja", "w") as file:
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
                    source = str((ROOT / source).resolve())
                    writer.build(objects[-1], "cxx", source, variables={"isa": f"{isa} -DCHASSIS_ISA={name}"})
            objects.append("bindings.o")
            known = " ".join(f"-DCHASSIS_HAVE_{name.upper()}" for name in variants)
            writer.build(objects[-1], "cxx", str((ROOT / "csrc/bindings.cpp").resolve()), variables={"isa": known})
            writer.build(str(target), "link", objects)
        verbose = ["-v"] if self.verbose > 1 else []
        try:
            subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder), *verbose], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            # An extension left from an earlier build would run in place of the sources that just failed.
            for folder in [target.parent] + self.into_source * [ROOT / "chassis_kernels"]:
                (folder / target.name).unlink(missing_ok=True)
            raise CompileError(
                f"{ext.name} was not built with {compiler!r}: see the compiler's output above. Install a C++17 compiler and "
                "Python's headers, or name a compiler in CXX"
            ) from error


setup(
    packages=find_packages(include=["chassis_kernels*"]) + find_packages("python"),
    package_dir={"chassis": "python/chassis"},
    package_data={"chassis_kernels": ["tuning/*.json"], "chassis": ["assets/*"]},
    ext_modules=[
        Extension(
            "chassis_kernels._C",
            sources=["csrc/bindings.cpp", *KERNELS],
            depends=HEADERS,
            optional=os.environ.get("CHASSIS_REQUIRE_EXTENSION") != "1",
        )
    ],
    cmdclass={"build_ext": NinjaBuild},
)
