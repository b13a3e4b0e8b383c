"""Builds the compiled kernels; everything else about the package is in pyproject.toml.

The kernels are optional: without a C compiler or Python's headers the package still installs, and NumPy serves.
"""

from __future__ import annotations

import runpy
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError, ExecError, LinkError, PlatformError

# No -march: each instruction set has its own file with its own target, chosen at run time.  Contraction would let
# the compiler fuse what must round twice; the kernels' bits are the same on every machine.
FLAGS = ["-O3", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-pthread"]
FAILURES = (CCompilerError, CompileError, ExecError, LinkError, PlatformError, OSError)


class Build(build_ext):
    """With OpenMP (the bench's limits use it) where there is some; a failure costs the kernels and nothing else."""

    def build_extension(self, ext: Extension) -> None:
        flags = ext.extra_compile_args
        try:
            ext.extra_compile_args, ext.extra_link_args = [*flags, "-fopenmp"], ["-fopenmp"]
            super().build_extension(ext)
        except FAILURES as error:
            self.announce(f"no OpenMP ({error}); trying without", level=2)
            ext.extra_compile_args, ext.extra_link_args = flags, ["-pthread"]
            try:
                super().build_extension(ext)
            except OSError as missing:  # no compiler at all: `optional` forgives a CompileError
                raise CompileError(str(missing)) from missing


def kernels() -> list[Extension]:
    """The extension, or nothing where Cython is missing (a build without isolation)."""
    try:
        from Cython.Build import cythonize
    except ImportError:
        print("mpillm: no Cython, so the kernels are not compiled and NumPy serves")
        return []
    runpy.run_path("cython/declare.py")["write"]()
    extension = Extension(
        "mpillm.kernels._compiled",
        sources=["cython/kernels.pyx", *sorted(glob("cython/core/*.c"))],
        depends=sorted([*glob("cython/*.pxi"), *glob("cython/core/*.h")]),
        extra_compile_args=FLAGS,
    )
    limits = Extension(
        "mpillm.kernels._limits",  # what `mpillm bench` compares the others with
        sources=["cython/limits.pyx"],
        extra_compile_args=FLAGS,
    )
    built: list[Extension] = cythonize([extension, limits], quiet=True)
    for each in built:
        each.optional = True  # cythonize drops it
    return built


setup(ext_modules=kernels(), cmdclass={"build_ext": Build})
