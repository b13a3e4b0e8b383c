"""AMX: from 9 rows on (BF16, W8A8) or 32, with the bits of the path below; where there is no leave, that one serves.

A processor with AVX-512 but without AMX computes the same, with tile instructions that tiles.c emulates."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from mpillm import kernels
from mpillm.kernels import BlockType
from tests.conftest import HANGS
from tests.kernels import cases, programs

ROOT = Path(__file__).resolve().parents[2]
TYPES = [type for type in BlockType if type.quantised or type.multiplied_as == BlockType.BF16]
# Those with tiles of their own, whose emulated products are counted.
TILED = ("BF16", "BF12", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "W8A8")
HERE = "amx" in kernels.available()
pytestmark = pytest.mark.timeout(3 * programs.SLOW)  # the first test compiles the harness
native = pytest.mark.skipif(not HERE, reason="no AMX here, or no leave to use it")

# Linux as it would answer where tiles are forbidden: arch_prctl(ARCH_REQ_XCOMP_PERM) fails with EPERM.
REFUSED = """
import ctypes, os, struct
os.environ.pop("MPILLM_KERNELS", None)
code = [(0x20, 0, 0, 0), (0x15, 0, 3, 158), (0x20, 0, 0, 16), (0x15, 0, 1, 0x1023), (6, 0, 0, 0x50001),
        (6, 0, 0, 0x7FFF0000)]
text = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in code))
program = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(code), ctypes.addressof(text)))
libc = ctypes.CDLL(None, use_errno=True)
assert not libc.prctl(38, 1, 0, 0, 0) and not libc.prctl(22, 2, program, 0, 0), ctypes.get_errno()
from mpillm import kernels
print(kernels.path(), *kernels.available())
"""

FORKED = """
import os, sys
import numpy as np
from mpillm import kernels
from tests.kernels import cases
case = cases.product(np.random.default_rng(8), kernels.BlockType.Q4_0, 200, 300, 40, threads=2)
kernels.set_path("amx")
want = case.run()[-1]
child = os.fork()
if not child:
    os._exit(0 if cases.same(case.run()[-1], want) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = kernels.path()
    yield
    kernels.set_path(before)


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


Check = Callable[[Sequence[cases.Case]], int]


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """Compares the path `amx` with the scalar one; returns how many products of tiles were emulated."""

    def natively(batch: Sequence[cases.Case]) -> int:
        for case, want in zip(batch, programs.scalar(batch), strict=True):
            kernels.set_path("amx")
            for got, expected in zip(case.run(), want, strict=True):
                assert cases.same(got, expected), str(case)
        return 0

    def emulated(batch: Sequence[cases.Case]) -> int:
        done = programs.check(batch, programs.scalar(batch), [str(program)], "amx")
        return int(done.stderr.split()[0])

    if HERE:
        return natively
    if "avx512vnni" not in kernels.available() or not shutil.which("gcc"):
        pytest.skip("no AMX here, and no AVX-512 VNNI and gcc to emulate it with")
    program = programs.program_of("gcc", tmp_path_factory)
    return emulated


@pytest.mark.parametrize("type", TYPES)
def test_any_number_of_rows_equals_scalar(type: BlockType, check: Check) -> None:
    rng = np.random.default_rng(int(type))
    shapes = [(int(rng.integers(1, 300)), int(rng.integers(1, 1300)), m) for m in range(1, 71)]
    emulated = check([cases.product(rng, type, *shape, 2, int(rng.integers(2))) for shape in shapes])
    assert HERE or bool(emulated) == (type.name in TILED)


@pytest.mark.parametrize("m", [9, 64, 257, 530])  # of which so many, 256 or fewer, pass at once
def test_many_rows_and_columns_of_bf16_equal_scalar(m: int, check: Check) -> None:
    rng = np.random.default_rng(m)
    # tiles are made of 4096 columns at a time
    columns = (int(rng.integers(1, 300)), 4097 + int(rng.integers(1500)))
    check(
        [
            cases.product(rng, BlockType.BF16, int(rng.integers(1, 100)), k, m, 2, int(rng.integers(2)))
            for k in columns
        ]
    )


@pytest.mark.parametrize(("k", "m"), [(4096, 64), (4128, 64), (8200, 40), (16384, 17), (16416, 17)])
def test_panels_of_w8a8_as_wide_as_copies_of_x_allow_equal_scalar(k: int, m: int, check: Check) -> None:
    """64 rows up to 4096 columns, 16 up to 16384, none beyond; more tiles than stay in the second cache."""
    rng = np.random.default_rng(k)
    case = cases.product(rng, BlockType.W8A8, 150, k, m)
    case.arrays[1] = np.array([0, k], np.int32)
    emulated = check([case])
    assert HERE or bool(emulated) == (k <= 16384)


@native
def test_where_tiles_are_refused_the_path_below_serves() -> None:
    path, *available = run(REFUSED).split()
    assert path == available[-1] == "avx512vnni"
    assert "amx" not in available


@native
def test_the_child_of_a_fork_has_tiles() -> None:
    run(FORKED)
