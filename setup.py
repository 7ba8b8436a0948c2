"""Builds fastpeft._C with ninja and pybind11: CPU sources where a C++ compiler is, CUDA sources checked where nvcc is.

No torch is needed at build time. Without a compiler the package installs without the extension and says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CPU_SOURCES = ("csrc/module.cpp", "csrc/dropout.cpp")
CUDA_SOURCES = ("csrc/dropout.cu",)
CUDA_ARCHITECTURES = ("80", "90a", "100")


def compiler() -> str | None:
    """The C++ compiler: $CXX, else the first of c++, g++, clang++ on the path."""
    asked = os.environ.get("CXX")
    return shutil.which(asked) if asked else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def nvcc() -> str | None:
    """nvcc from $NVCC, the path, or $CUDA_HOME/bin."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which(os.environ.get("NVCC", "nvcc")) or (shutil.which(f"{home}/bin/nvcc") if home else None)


def ninja_file(cxx: str, cuda: str | None, target: Path, build: Path) -> str:
    """build.ninja for the extension; with nvcc the CUDA sources are compiled too (see README: built, not called yet)."""
    import pybind11

    root = Path(__file__).parent.resolve()
    includes = f"-I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    defines = " ".join(
        f"-D{key}='\"{value}\"'"
        for key, value in {
            "FASTPEFT_COMPILER": version,
            "FASTPEFT_CPU_SOURCES": " ".join(CPU_SOURCES),
            "FASTPEFT_CUDA_SOURCES": " ".join(CUDA_SOURCES) if cuda else "",
            "FASTPEFT_CUDA_ARCHS": " ".join(f"sm_{a}" for a in CUDA_ARCHITECTURES) if cuda else "",
        }.items()
    )
    # no contraction: a fused multiply-add would round y += x * mask once where the torch path rounds twice
    flags = f"-std=c++17 -O3 -ffp-contract=off -fPIC -fvisibility=hidden -pthread {includes}"
    gencode = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES)
    lines = [
        f"rule cxx\n  command = {cxx} -MMD -MF $out.d {flags} {defines} -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {cxx} -shared -pthread $in -o $out",
    ]
    objects, extra = [], []
    for source in CPU_SOURCES:
        objects.append(str(build / (Path(source).stem + ".o")))
        lines.append(f"build {objects[-1]}: cxx {root / source}")
    if cuda:
        lines.append(f"rule nvcc\n  command = {cuda} -O3 -std=c++17 {gencode} -Xcompiler -fPIC -c $in -o $out")
        for source in CUDA_SOURCES:
            extra.append(str(build / (Path(source).stem + ".cuda.o")))
            lines.append(f"build {extra[-1]}: nvcc {root / source}")
    lines.append(f"build {target}: link {' '.join(objects)}")
    lines.append(f"default {target} {' '.join(extra)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cxx = compiler()
        if cxx is None:
            print("fastpeft: no C++ compiler found; installing without fastpeft._C (slower dropout)", file=sys.stderr)
            return
        import ninja

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = (Path(self.build_temp) / "fastpeft").resolve()
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(cxx, nvcc(), target, build))
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build)], check=True)

    def copy_extensions_to_source(self) -> None:
        if compiler() is not None:
            super().copy_extensions_to_source()


setup(
    # found by listing, so that a new sub-package needs no edit; the kernels stay at the top level because `triton_kernels`
    # is the import name of another project's package
    packages=[*find_packages(include=["fastpeft", "fastpeft.*"]), "fastpeft.triton_kernels"],
    package_dir={"fastpeft.triton_kernels": "triton_kernels"},
    ext_modules=[Extension("fastpeft._C", sources=list(CPU_SOURCES))],
    cmdclass={"build_ext": NinjaBuild},
)
