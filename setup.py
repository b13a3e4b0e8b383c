"""Builds the compiled kernels and the long description; everything else about the package is in pyproject.toml.

The kernels are optional: without a C compiler or Python's headers the package still installs, and NumPy serves.
"""

from __future__ import annotations

import os
import re
import runpy
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError, ExecError, LinkError, PlatformError

# No -march: each instruction set has its own file with its own target, chosen at run time.  Contraction would let
# the compiler fuse what must round twice; the kernels' bits are the same on every machine.  Python's own flags ask for
# what a debugger needs (-g): nine tenths of the file, and a fifth of the time to compile it.
FLAGS = ["-O3", "-g0", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-pthread"]
# Cython's code only checks arguments and calls: with -O3 it takes longer to compile than most paths.
OF_ONE_SOURCE = {"cython/kernels.c": ["-O1"]}
KERNELS = "mpillm.kernels._compiled"
FAILURES = (CCompilerError, CompileError, ExecError, LinkError, PlatformError, OSError)


def compile_in_parallel(
    compiler: Any,
    sources: list[str],
    output_dir: str | None = None,
    macros: Any = None,
    include_dirs: Any = None,
    debug: bool = False,
    extra_preargs: Any = None,
    extra_postargs: Any = None,
    depends: Any = None,
) -> list[str]:
    """`CCompiler.compile` of setuptools, which compiles one source after the other, with a thread for each core."""
    macros, objects, extra_postargs, preprocessor, build = compiler._setup_compile(
        output_dir, macros, include_dirs, sources, depends, extra_postargs
    )
    flags = compiler._get_cc_args(preprocessor, debug, extra_preargs)
    compile_one: Callable[..., None] = compiler._compile
    # The largest sources first, so that no core waits for a long one at the end.
    order = sorted(
        (name for name in objects if name in build), key=lambda name: -os.path.getsize(build[name][0])
    )
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        jobs = [
            pool.submit(compile_one, name, *build[name], flags, [*extra_postargs, *of_source], preprocessor)
            for name in order
            for of_source in [OF_ONE_SOURCE.get(build[name][0], [])]
        ]
        wait(jobs, return_when=FIRST_EXCEPTION)
        for job in jobs:
            job.cancel()  # after a failure; where there is none, all are done
        for job in jobs:
            if not job.cancelled():
                job.result()
    return list(objects)


class Build(build_ext):
    """With OpenMP where the compiler has it, a file for each core at a time; a failure costs only the kernels."""

    def build_extensions(self) -> None:
        self.compiler.compile = partial(compile_in_parallel, self.compiler)
        super().build_extensions()
        # Says what the kernels were made of, for a checkout that is without: see mpillm/kernels/installed.py.
        compiled, installed = (
            Path(self.get_ext_fullpath(KERNELS)),
            runpy.run_path("mpillm/kernels/installed.py"),
        )
        if compiled.exists():
            digest = installed["sources_digest"](Path("cython"))
            compiled.with_name(installed["RECORD"]).write_text(f"{digest}\n")

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
        KERNELS,
        sources=["cython/kernels.pyx", *sorted(glob("cython/core/*.c"))],
        depends=sorted([*glob("cython/*.pxi"), *glob("cython/core/*.h")]),
        extra_compile_args=FLAGS,
    )
    limits = Extension(
        "mpillm.kernels._limits",  # what `mpillm bench` compares the others with
        sources=["cython/limits.pyx"],
        extra_compile_args=FLAGS,
    )
    flags = Extension(
        "mpillm.kernels._flags",  # how shards of one host wait for each other
        sources=["cython/flags.pyx"],
        extra_compile_args=FLAGS,
    )
    built: list[Extension] = cythonize([extension, limits, flags], quiet=True)
    for each in built:
        each.optional = True  # cythonize drops it
    return built


def description() -> str:
    """README.md for a package index, where links to files of the checkout lead nowhere: their texts, no pictures."""
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"^(<!--.*-->|!\[.*\]\(docs/.*\))\n\n", "", text, flags=re.M)
    return re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


setup(
    ext_modules=kernels(),
    cmdclass={"build_ext": Build},
    long_description=description(),
    long_description_content_type="text/markdown",
)
