"""A 64-bit Arm machine in a folder, for programs under qemu-user: `python -m tests.arm.machine FOLDER` (root; minutes).

It has Debian's Python and C library, wheels of what mpillm needs, MPICH, and mpillm with kernels that are compiled for
it. Nothing is mounted or registered: FOLDER/python runs anywhere on this machine, and mpiexec starts it as it is.

Needs debootstrap, qemu-user-static, gcc-aarch64-linux-gnu and libc6-dev-arm64-cross. Afterwards
`MPILLM_TEST_ARM=FOLDER python -m pytest tests/arm` runs jobs there; what is in FOLDER already is not made again.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEBIAN, PYTHON = "bookworm", (3, 11)
EMULATOR, COMPILER = "qemu-aarch64-static", "aarch64-linux-gnu-gcc"
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
ALSO = ("markupsafe", "pyyaml", "requests")  # what packages need that mpillm names
KERNELS = {  # module: its sources
    "_compiled": ("cython/kernels.pyx", "cython/core/*.c"),
    "_flags": ("cython/flags.pyx",),
    "_limits": ("cython/limits.pyx",),
}
FLAGS = "-O2 -std=c11 -ffp-contract=off -fno-math-errno -fvisibility=hidden -fopenmp -fPIC"


def debian(to: Path) -> None:
    """Debian's files, unpacked: their installation would run programs."""
    packages = "--include=python3,libgomp1"
    _run("debootstrap", "--arch=arm64", "--foreign", "--variant=minbase", packages, DEBIAN, to)
    for package in sorted((to / "var/cache/apt/archives").glob("*.deb")):
        _run("dpkg-deb", "-x", package, to)
    for name in ("dev", "proc", "sys", "tmp"):  # the emulator would look there before this machine's
        shutil.rmtree(to / name, ignore_errors=True)


def packages(to: Path) -> None:
    """Wheels of mpillm's dependencies."""
    listed = re.search(
        r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE
    )
    assert listed is not None
    names = [name for name in re.findall(r'"(.*?)"', listed[1]) if ";" not in name]
    _pip("install", "--target", to, *names, *ALSO)


def mpich(to: Path) -> None:
    """The library of MPICH's wheel, which pip would not put where the program looks for it."""
    _pip("download", "--dest", to, "mpich")
    with zipfile.ZipFile(next(to.glob("*.whl"))) as wheel:
        wheel.extractall(to)


def source(to: Path) -> None:
    """mpillm as it is here, with kernels that are compiled for Arm."""
    shutil.copytree(ROOT / "mpillm", to / "mpillm", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    runpy.run_path(str(ROOT / "cython/declare.py"), init_globals=None)["write"]()
    for module, patterns in KERNELS.items():
        objects = to / "objects" / module
        objects.mkdir(parents=True)
        sources = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(lambda path, objects=objects: _compiled(path, objects), sources))
        library = to / "mpillm/kernels" / f"{module}.cpython-{''.join(map(str, PYTHON))}-aarch64-linux-gnu.so"
        _run(COMPILER, "-shared", "-fopenmp", *made, "-o", library, "-lm")


def _compiled(path: Path, to: Path) -> Path:
    if path.suffix == ".pyx":
        _run(
            sys.executable,
            "-m",
            "cython",
            "-3",
            f"--module-name=mpillm.kernels.{to.name}",
            path,
            "-o",
            to / f"{path.stem}.c",
            cwd=ROOT,
        )
        path = to / f"{path.stem}.c"
    include = ["-I", sysconfig.get_path("include"), "-I", ROOT / "cython", "-I", ROOT / "cython/core"]
    _run(COMPILER, *FLAGS.split(), *include, "-c", path, "-o", to / f"{path.stem}.o")
    return to / f"{path.stem}.o"


def python(to: Path) -> None:
    """The program that runs Python there."""
    folder, version = to.parent, ".".join(map(str, PYTHON))
    tree, library = folder / "debian", next(folder.glob("mpich/*.data/data/lib"))
    settings = {
        "PYTHONHOME": tree / "usr",
        "PYTHONPATH": f"{folder / 'source'}:{folder / 'packages'}",
        "MPI4PY_LIBMPI": library / "libmpi.so.12",
        "LD_LIBRARY_PATH": library,
    }
    words = " ".join(f"-E {name}={value}" for name, value in settings.items())
    to.write_text(f'#!/bin/sh\nexec {EMULATOR} -L {tree} {words} {tree}/usr/bin/python{version} "$@"\n')
    to.chmod(0o755)
    # What Python starts a Python with: the machine's own cannot run without the emulator.
    (folder / "source" / "sitecustomize.py").write_text(f"import sys\n\nsys.executable = {str(to)!r}\n")


PARTS: tuple[Callable[[Path], None], ...] = (debian, packages, mpich, source, python)


def make(folder: Path) -> None:
    """Make what is not there yet; `source` and what runs it anew each time."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "source", ignore_errors=True)
    (folder / "python").unlink(missing_ok=True)
    for part in PARTS:
        to, begun = folder / part.__name__, folder / f"{part.__name__}.begun"
        if not to.exists() or begun.exists():
            shutil.rmtree(to, ignore_errors=True)
            begun.touch()
            part(to)
            begun.unlink()


def _pip(command: str, *words: str | Path) -> None:
    platforms = [f"--platform={name}" for name in PLATFORMS]
    version = f"--python-version={'.'.join(map(str, PYTHON))}"
    _run(
        sys.executable,
        "-m",
        "pip",
        command,
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        version,
        *platforms,
        *words,
    )


def _run(*words: str | Path, cwd: Path | None = None) -> None:
    subprocess.run([str(word) for word in words], check=True, cwd=cwd, stdout=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.arm.machine", description=__doc__)
    parser.add_argument("folder", type=Path)
    if sys.version_info[:2] != PYTHON:
        parser.error(
            f"Debian {DEBIAN} has Python {'.'.join(map(str, PYTHON))}: use its headers, with that Python"
        )
    make(parser.parse_args().folder)


if __name__ == "__main__":
    main()
