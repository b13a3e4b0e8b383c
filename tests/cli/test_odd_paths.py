"""Paths that are not UTF-8 are taken wherever a path is given, and written where others find it again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpillm.launching.hostfile import HostSlots, read_hosts
from mpillm.store.merge import merge
from tests.conftest import clean_environment, run_bounded
from tests.e2e.jobs import CHAT, write_lines

ODD = os.fsdecode(b"caf\xe9 \xff")


def mpillm(*words: object) -> subprocess.CompletedProcess[str]:
    done = run_bounded([sys.executable, "-m", "mpillm", *map(str, words)], env=clean_environment())
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / ODD
    try:
        made.mkdir()
    except OSError:
        pytest.skip("the file system takes no such names")
    return made


def test_packed_exported_and_merged(folder: Path) -> None:
    model, packed, output = folder / f"m {ODD}", folder / f"p {ODD}", folder / f"o {ODD}"
    shutil.copytree(CHAT, model)
    source = write_lines(folder / f"{ODD}.jsonl", [{"prompt": "the fox", "max_tokens": 2}])
    mpillm("pack", model, packed, "--weights", "q8_0")
    mpillm("run", "--model", packed, "--input", source, "--output", output)
    mpillm("export", output, "--format", "csv")
    assert "the fox" in (output / "table.csv").read_text()
    shutil.copytree(output, folder / "again")
    made = merge([output, folder / "again"], folder / f"merged {ODD}")
    assert (made.requests, made.renamed) == (2, True)
    lines = (folder / f"merged {ODD}" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["custom_id"] for line in lines] == [
        r"o caf\xe9 \xff/request-1",
        "again/request-1",
    ]


def test_a_hostfile_may_have_any_bytes_in_a_comment(folder: Path) -> None:
    path = folder / ODD
    path.write_bytes(b"# K\xfcche\nnode1 slots=2\nnode2:3\n")
    assert read_hosts(path) == [HostSlots("node1", 2), HostSlots("node2", 3)]
