"""The model cannot be read any more in the middle of a run: a sentence, nothing lost, and the same command goes on."""

from __future__ import annotations

import errno
import os
import random
import sys
from pathlib import Path

import pytest

from tests.conftest import Mpi, clean_environment, get_mpi, run_bounded
from tests.e2e.jobs import CHAT, command, mixed_lines, write_lines

pytestmark = pytest.mark.mpiexec
PROGRAM = Path(__file__).with_name("failing_reads.py")
REQUESTS = 24


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("eio") / "in.jsonl", mixed_lines(REQUESTS, seed=8, tokens=20))


@pytest.fixture(scope="module")
def packed(source: Path) -> Path:
    target = source.with_name(CHAT.name)  # answers carry it
    done = run_bounded([sys.executable, "-m", "mpillm", "pack", CHAT, target], env=clean_environment())
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def undisturbed(source: Path) -> Path:
    output = source.with_name("undisturbed")
    done = get_mpi("openmpi").run(1, *command(source, output))
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.parametrize(
    ("model", "loader", "ranks", "number"),
    [
        pytest.param("packed", "read", "1", errno.EIO, id="a follower's disk"),
        pytest.param("packed", "read", "0,1", errno.EACCES, id="a permission, everywhere"),
        pytest.param("packed", "mmap", "0", errno.EIO, id="rank 0's disk under a map"),
        pytest.param("source", "read", "1", errno.EIO, id="an unpacked model's disk"),
    ],
)
def test_a_model_that_cannot_be_read_any_more(
    model: str, loader: str, ranks: str, number: int, source: Path, packed: Path, undisturbed: Path, openmpi: Mpi,
    tmp_path: Path,
) -> None:  # fmt: skip
    # Without drafts the number of loads does not depend on the time: 229 of a packed model, 192 of the other on rank 1.
    # The long answers come first, so most loads are over before the first answer is.
    loads = str(random.randint(160, 220) if model == "packed" else random.randint(135, 185))
    settings = [
        "batch.max_num_seqs=4",
        "batch.speculation=off",
        "memory.weights=32KiB",
        f"memory.loader={loader}",
    ]
    asked = command(source, tmp_path / "out", *settings, model=packed if model == "packed" else CHAT)
    done = openmpi.run(2, PROGRAM, ranks, str(number), loads, *asked[2:])
    # Embeddings are read, not mapped.
    words = {os.strerror(number)} | ({"its disk failed"} if loader == "mmap" else set())
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if ".safetensors cannot be read any more: " in line]
    assert 1 <= len(said) <= len(ranks.split(",")), done.stderr
    assert all(any(word in line for word in words) for line in said), done.stderr
    again = openmpi.run(2, *asked)
    assert again.returncode == 0, again.stderr
    assert f"{REQUESTS} requests (" in again.stderr
    assert "by earlier runs" in again.stderr
    for name in (
        "results.jsonl",
        *(["results.h5"] if model == "source" else []),
    ):  # which says what model it was
        assert (tmp_path / "out" / name).read_bytes() == (undisturbed / name).read_bytes()
