"""The paths that this machine lacks, under an emulator: the same C, random records, the scalar path's bits.

Needs cross-compilers and qemu-user (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from mpillm import kernels
from tests.kernels import cases, programs

pytestmark = pytest.mark.timeout(3 * programs.SLOW)

MACHINES = {  # compiler, emulator with its processor, paths that processor has, and those that no weaker one has
    "arm with i8mm": (
        programs.ARM,
        "qemu-aarch64-static -cpu max",
        "scalar neon neondot neoni8mm",
        "neondot neoni8mm",
    ),
    "arm without dotprod": (
        programs.ARM,
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


@pytest.fixture(scope="module", params=list(MACHINES))
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    compiler, emulator, *paths = MACHINES[request.param]
    if compiler == "gcc" and not programs.X86:
        pytest.skip("this machine's gcc does not compile for x86-64")
    for tool in (compiler, emulator.split()[0]):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    command = [*emulator.split(), str(programs.program_of(compiler, tmp_path_factory))]
    return Machine(command, *(names.split() for names in paths))


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = kernels.path()
    yield
    kernels.set_path(before)


def test_the_processor_decides_which_paths_there_are(machine: Machine) -> None:
    assert programs.outputs_of(machine.command, "list").stdout.decode().split() == machine.paths


@pytest.mark.skipif("scalar" not in kernels.available(), reason="the extension is not built")
def test_every_path_equals_this_machines_scalar_one(machine: Machine) -> None:
    # What this machine has, test_paths tests, and faster.
    absent = [path for path in machine.own if path not in kernels.available() or path == "scalar"]
    batch = list(cases.everything(np.random.default_rng(17))) if absent else []
    want = programs.scalar(batch)
    for path in absent:
        programs.check(batch, want, machine.command, path)
