"""The paths that this machine lacks, under an emulator: the same C, random records, the scalar path's bits.

Needs cross-compilers and qemu-user (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static)."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mpillm import kernels
from tests.kernels import cases

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "-std=c11",
    "-O1",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-pthread",
]

# Seconds: a path with all block types takes a compiler a minute, on machines that are shared several.
SLOW = 600
pytestmark = pytest.mark.timeout(3 * SLOW)

X86 = platform.machine() == "x86_64"
MACHINES = {  # compiler, emulator with its processor, paths that processor has, and those that no weaker one has
    "arm with i8mm": (
        "aarch64-linux-gnu-gcc",
        "qemu-aarch64-static -cpu max",
        "scalar neon neondot neoni8mm",
        "neondot neoni8mm",
    ),
    "arm without dotprod": (
        "aarch64-linux-gnu-gcc",
        "qemu-aarch64-static -cpu cortex-a72",
        "scalar neon",
        "scalar neon",
    ),
    "x86 with AVX2": ("gcc", "qemu-x86_64-static -cpu Haswell", "scalar avx avx2", "avx2"),
    "x86 with AVX": ("gcc", "qemu-x86_64-static -cpu SandyBridge", "scalar avx", "avx"),
    "x86 without": ("gcc", "qemu-x86_64-static -cpu Nehalem", "scalar", "scalar"),
}


@dataclass
class Machine:
    command: list[str]
    paths: list[str]
    own: list[str]  # those that no weaker machine has: there an instruction that it lacks would show

    def run(self, argument: str, stdin: bytes = b"") -> bytes:
        done = subprocess.run(
            [*self.command, argument], input=stdin, capture_output=True, timeout=SLOW, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout


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
    core = ROOT / "cython" / "core"
    sources = [*sorted(core.glob("*.c")), Path(__file__).with_name("harness.c")]

    def compile(source: Path) -> str:
        target = str(to / f"{source.stem}.o")
        subprocess.run(
            [compiler, *FLAGS, "-I", str(core), "-c", str(source), "-o", target], check=True, timeout=SLOW
        )
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, sources))
    program = to / "harness"
    subprocess.run(
        [compiler, "-static", "-pthread", *objects, "-o", str(program), "-lm"], check=True, timeout=SLOW
    )
    return program


@pytest.fixture(scope="module", params=list(MACHINES))
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    compiler, emulator, *paths = MACHINES[request.param]
    if compiler == "gcc" and not X86:
        pytest.skip("this machine's gcc does not compile for x86-64")
    for tool in (compiler, emulator.split()[0]):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    command = [*emulator.split(), str(program_of(compiler, tmp_path_factory))]
    return Machine(command, *(names.split() for names in paths))


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = kernels.path()
    yield
    kernels.set_path(before)


def test_the_processor_decides_which_paths_there_are(machine: Machine) -> None:
    assert machine.run("list").decode().split() == machine.paths


@pytest.mark.skipif("scalar" not in kernels.available(), reason="the extension is not built")
def test_every_path_equals_this_machines_scalar_one(machine: Machine) -> None:
    kernels.set_path("scalar")
    # What this machine has, test_paths tests, and faster.
    absent = [path for path in machine.own if path not in kernels.available() or path == "scalar"]
    batch = list(cases.everything(np.random.default_rng(17))) if absent else []
    want = [case.run() for case in batch]
    stdin = b"".join(case.record() for case in batch)
    for path in absent:
        stdout = machine.run(path, stdin)
        at = 0
        for case, outputs in zip(batch, want, strict=True):
            for expected in outputs:
                got = np.frombuffer(stdout, expected.dtype, expected.size, at).reshape(expected.shape)
                assert cases.same(got, expected), f"{path}: {case}"
                at += expected.nbytes
        assert at == len(stdout)
