"""Jobs on 64-bit Arm under an emulator, alone and together with ranks of this machine: the same bytes.

MPILLM_TEST_ARM names a folder that `python -m tests.arm.machine` has made.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.conftest import Mpi, run_bounded
from tests.e2e.jobs import command, mixed_lines, write_lines

pytestmark = [pytest.mark.mpiexec, pytest.mark.timeout(900)]
SLOW = 400  # seconds: an emulator starts Python in ten
# Ranks of unlike machines share no memory.
TCP = {
    "FI_PROVIDER": "tcp",
    "MPIR_CVAR_CH4_NETMOD": "ofi",
    "MPIR_CVAR_NOLOCAL": "1",
    "MPILLM_DEADLINE": "120",
}


@pytest.fixture(scope="module")
def arm() -> Path:
    folder = os.environ.get("MPILLM_TEST_ARM")
    if not folder:
        pytest.skip("MPILLM_TEST_ARM names no folder that `python -m tests.arm.machine FOLDER` has made")
    return Path(folder).resolve() / "python"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("in") / "in.jsonl", mixed_lines(4, seed=3, tokens=6))


@pytest.mark.parametrize(
    ("machines", "layout"),
    [("arm arm", "layout.shards=2"), ("x86 arm", "layout.shards=2"), ("arm x86", "layout.stages=2")],
)
def test_two_ranks_give_the_same_bytes(
    machines: str, layout: str, arm: Path, mpich: Mpi, source: Path, tmp_path: Path
) -> None:
    alone = run_bounded([sys.executable, *command(source, tmp_path / "alone")])
    assert alone.returncode == 0, alone.stderr
    pythons = {
        "arm": [str(arm)],
        "x86": ["env", f"MPI4PY_LIBMPI={mpich.env['MPI4PY_LIBMPI']}", sys.executable],
    }
    words: list[str | Path] = [mpich.mpiexec]
    for number, machine in enumerate(machines.split()):
        words += [":"] * bool(number) + ["-n", "1", *pythons[machine]]
        words += command(source, tmp_path / "out", layout, "layout.threads=1")
    done = run_bounded(
        words, SLOW, env={**os.environ, **TCP}, cwd=tmp_path
    )  # not in the checkout, whose kernels are this machine's
    assert done.returncode == 0, done.stderr
    for name in ("results.jsonl", "results.h5"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    ranks = json.loads((tmp_path / "out" / "report.json").read_text())["ranks"]
    assert [rank["kernels"].startswith("neon") for rank in ranks] == [
        name == "arm" for name in machines.split()
    ]
