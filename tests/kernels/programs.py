"""Programs of the kernels, for processors and instructions that this machine lacks: the harness, and products."""

from __future__ import annotations

import fcntl
import os
import platform
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mpillm import kernels
from tests.kernels import cases

CORE = Path(__file__).resolve().parents[2] / "cython" / "core"
FLAGS = [
    "-std=c11",
    "-O1",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-pthread",
]
# Of the sources whose instructions are counted: as setup.py compiles them. With -O3 gcc 12 warns of values that NEON's
# intrinsics set.
SHIPPED = ["-O3", "-fno-math-errno", "-Wno-maybe-uninitialized"]
ARM = "aarch64-linux-gnu-gcc"
COUNTED = "neondot"  # the path of Arm whose instructions test_instructions.py counts

X86 = platform.machine() == "x86_64"
# gcc for this machine also links what stands for tile instructions.
TILES = {"gcc": ["-Wl,--wrap=mk_set_path"]} if X86 else {}

# Seconds: a path with all block types takes a compiler a minute, on machines that are shared several.
SLOW = 600


def program_of(compiler: str, factory: pytest.TempPathFactory, name: str = "harness") -> Path:
    """The harness, or `products`, and the kernels as one static program.

    The first of the workers that asks for one builds it; both programs have the same kernels.
    """
    base = factory.getbasetemp()
    to = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"kernels-{compiler}"
    to.mkdir(exist_ok=True)
    with (to / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        program = to / name
        return program if program.exists() else build(compiler, to, name, COUNTED if compiler == ARM else "")


def build(compiler: str, to: Path, name: str, counted: str) -> Path:
    """Make a program in a directory where the kernels may be compiled already.

    Those of the path `counted`, and those of NEON that other paths share, are optimised as setup.py does it.
    """
    shipped = {f"path_{counted}", "path_neon", "run", "api"} if counted else set()
    tests = [f"{name}.c", *(["tiles.c"] if compiler in TILES else [])]
    sources = [*sorted(CORE.glob("*.c")), *(Path(__file__).with_name(each) for each in tests)]

    def compile(source: Path) -> str:
        target = to / f"{source.stem}.o"
        flags = [*FLAGS, *(SHIPPED if source.stem in shipped else [])]
        if not target.exists():
            part = target.with_suffix(".part")
            subprocess.run(
                [compiler, *flags, "-I", str(CORE), "-c", str(source), "-o", str(part)],
                check=True,
                timeout=SLOW,
            )
            part.rename(target)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # The paths first, which take longest, so that no core waits for one at the end.
        objects = list(pool.map(compile, sorted(sources, key=lambda path: not path.stem.startswith("path_"))))
    program = to / name
    subprocess.run(
        [compiler, "-static", "-pthread", *objects, *TILES.get(compiler, []), "-o", str(program), "-lm"],
        check=True,
        timeout=SLOW,
    )
    return program


def outputs_of(command: list[str], argument: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """The harness's answer; it must end well."""
    done = subprocess.run([*command, argument], input=stdin, capture_output=True, timeout=SLOW, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done


def scalar(batch: Sequence[cases.Case]) -> list[list[cases.Array]]:
    """What this machine's scalar path makes of them."""
    kernels.set_path("scalar")
    return [case.run() for case in batch]


def check(
    batch: Sequence[cases.Case], want: list[list[cases.Array]], command: list[str], path: str
) -> subprocess.CompletedProcess[bytes]:
    """A path of the harness makes of the cases what is wanted, bit for bit."""
    done, at = outputs_of(command, path, b"".join(case.record() for case in batch)), 0
    for case, outputs in zip(batch, want, strict=True):
        for expected in outputs:
            got = np.frombuffer(done.stdout, expected.dtype, expected.size, at).reshape(expected.shape)
            assert cases.same(got, expected), f"{path}: {case}"
            at += expected.nbytes
    assert at == len(done.stdout)
    return done
