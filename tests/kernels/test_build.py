"""Without a compiler the package still installs, NumPy computes, and one line says so; OpenMP is used where it is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import HANGS

ROOT = Path(__file__).resolve().parents[2]
IMPORT = (
    "import sys; sys.modules['mpillm.kernels._compiled'] = None; import mpillm.kernels as k; print(k.path())"
)


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )


def test_paths_that_differ_in_some_products_share_the_rest() -> None:
    """Compiling those paths whole took 2.5 times as long."""
    for path in (ROOT / "cython" / "core").glob("path_*.c"):
        text = path.read_text()
        assert ("VEC_VNNI" in text or "VEC_DOT" in text) == ("#define LIKE" in text), path.name


def test_a_failing_compiler_is_no_error(tmp_path: Path) -> None:
    pytest.importorskip("Cython")
    where = [f"--build-lib={tmp_path / 'lib'}", f"--build-temp={tmp_path / 'temp'}"]
    done = run(sys.executable, "setup.py", "-q", "build_ext", *where, CC="/bin/false")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))


COMPILER = """#!/bin/sh
echo "$@" >> {log}
case "{refused}" in ?*) case "$*" in *{refused}*) exit 1;; esac;; esac
while [ "$1" != -o ]; do shift; done
: > "$2"
"""


@pytest.mark.skipif(os.name != "posix", reason="the compiler is a shell script")
@pytest.mark.parametrize("refused", ["", "-fopenmp"])
def test_a_compiler_without_openmp_builds_all_the_same(refused: str, tmp_path: Path) -> None:
    """The compiler of this test only writes down how it is called; test_run.py runs what comes of it."""
    pytest.importorskip("Cython")
    compiler, log = tmp_path / "cc", tmp_path / "log"
    compiler.write_text(COMPILER.format(log=log, refused=refused))
    compiler.chmod(0o755)
    where = [f"--build-lib={tmp_path / 'lib'}", f"--build-temp={tmp_path / 'temp'}"]
    done = run(
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        *where,
        CC=str(compiler),
        LDSHARED=f"{compiler} -shared",
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name.split(".")[0] for path in tmp_path.rglob("*.so")) == [
        "_compiled",
        "_flags",
        "_limits",
    ]
    calls = log.read_text().splitlines()
    openmp = [call for call in calls if "-fopenmp" in call]
    sources = [path.name for path in (ROOT / "cython" / "core").glob("*.c")]
    if refused:
        assert 2 <= len(openmp) < len(sources)  # a few tries for each module: as many as began at once
    else:
        assert openmp == calls
    built = [call for call in calls if call not in openmp] if refused else calls
    for name in ["kernels.c", "limits.c", *sources]:
        (levels,) = (re.findall(r"-O\d", call) for call in built if f"{name} " in call and " -c " in call)
        assert levels[-1] == ("-O1" if name == "kernels.c" else "-O3"), (
            "Cython's code is slow to compile with -O3"
        )


ARM = "aarch64-linux-gnu-gcc"


@pytest.mark.skipif(not shutil.which(ARM), reason=f"{ARM} is not installed")
@pytest.mark.parametrize("module", ["flags", "limits"])
def test_the_small_modules_compile_for_arm(module: str, tmp_path: Path) -> None:
    """A wheel would only be without them, for each is optional; test_emulated.py compiles and runs the kernels."""
    pytest.importorskip("Cython")
    source = tmp_path / f"{module}.c"
    cython = [sys.executable, "-m", "cython", "-3", f"--module-name=mpillm.kernels._{module}"]
    words = ["-O1", "-std=c11", "-fopenmp", "-fPIC", f"-I{sysconfig.get_path('include')}", "-c", str(source)]
    for command in ([*cython, f"cython/{module}.pyx", "-o", str(source)], [ARM, *words, "-o", f"{source}.o"]):
        done = run(*command)
        assert done.returncode == 0, done.stderr


def test_one_line_says_that_numpy_computes() -> None:
    done = run(sys.executable, "-c", IMPORT, MPILLM_KERNELS="")
    assert done.stdout == "numpy\n"
    (line,) = done.stderr.splitlines()
    assert "the compiled kernels are missing" in line
    assert "NumPy computes instead" in line


def test_numpy_by_choice_says_nothing() -> None:
    done = run(sys.executable, "-c", IMPORT, MPILLM_KERNELS="numpy")
    assert (done.stdout, done.stderr) == ("numpy\n", "")


def test_a_path_that_is_missing_is_an_error() -> None:
    done = run(sys.executable, "-c", IMPORT, MPILLM_KERNELS="avx2")
    assert done.returncode == 1
    assert "MPILLM_KERNELS = avx2 cannot be used on this machine; choose from numpy" in done.stderr
