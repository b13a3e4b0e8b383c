"""The harness as a program, for processors and instructions that this machine lacks."""

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

X86 = platform.machine() == "x86_64"
# gcc for this machine also links what stands for tile instructions.
TILES = {"gcc": ["-Wl,--wrap=mk_set_path"]} if X86 else {}

# Seconds: a path with all block types takes a compiler a minute, on machines that are shared several.
SLOW = 600


def program_of(compiler: str, factory: pytest.TempPathFactory) -> Path:
    """The harness and the kernels as one static program, which the first of the workers that asks for it builds."""
    base = factory.getbasetemp()
    to = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"harness-{compiler}"
    to.mkdir(exist_ok=True)
    with (to / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        program = to / "harness"
        return program if program.exists() else build(compiler, to)


def build(compiler: str, to: Path) -> Path:
    tests = ["harness.c", *(["tiles.c"] if compiler in TILES else [])]
    sources = [*sorted(CORE.glob("*.c")), *(Path(__file__).with_name(name) for name in tests)]

    def compile(source: Path) -> str:
        target = str(to / f"{source.stem}.o")
        subprocess.run(
            [compiler, *FLAGS, "-I", str(CORE), "-c", str(source), "-o", target], check=True, timeout=SLOW
        )
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, sources))
    program = to / "harness"
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
