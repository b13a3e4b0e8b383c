"""`mpillm init` writes what comes with the package, and writes over nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpillm.errors import OutputError
from mpillm.tools import init
from tests.conftest import HANGS, ROOT, clean_environment, run_bounded


@pytest.mark.parametrize("what", sorted(init.SETS))
def test_the_files_of_the_package_are_written(what: str, tmp_path: Path) -> None:
    target = tmp_path / "a b"
    words = [sys.executable, "-m", "mpillm", "init", what, target]
    done = run_bounded(words, env=clean_environment())
    assert (done.returncode, f"'{target}" in done.stdout) == (0, True), done.stderr
    for name, to in init.SETS[what].items():
        sources = [path for path in (ROOT / name).iterdir() if path.is_file()]
        assert sources
        for source in sources:
            assert (target / to / source.name).read_bytes() == source.read_bytes()
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    (first, *others) = before
    for path in others:
        path.unlink()
    with pytest.raises(OutputError, match=f"{first.name} exists already and was not changed"):
        init.init(what, target)
    assert [path for path in target.rglob("*") if path.is_file()] == [first]


def test_nothing_is_written_beside_results(tmp_path: Path) -> None:
    (tmp_path / "journal").touch()
    with pytest.raises(OutputError, match=r"is the output directory of a run; give another directory\.$"):
        init.init("slurm", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]


@pytest.mark.parametrize("kind", ["venv", "conda", "set by hand", "none"])
def test_the_script_finds_the_environment(tmp_path: Path, kind: str) -> None:
    """site.sh names the environment that has mpillm; a conda environment has no `activate`."""
    init.init("slurm", tmp_path)
    site = tmp_path / "slurm/site.sh"
    assert str(Path(sys.prefix)) in site.read_text()
    found = tmp_path / "environment" / "bin"
    found.mkdir(parents=True)
    for name in ("python", "mpiexec"):
        (found / name).write_text(f'#!/bin/sh\necho "{name} $*" >&2; echo pmi2\n')
        (found / name).chmod(0o755)
    if kind == "venv":
        (found / "activate").write_text(f'PATH="{found}:$PATH"\n')
    if kind == "none":
        (found / "python").unlink()
    site.write_text(
        site.read_text().replace(sys.prefix, "/nowhere" if kind == "set by hand" else str(found.parent))
    )
    env = {"PATH": os.environ["PATH"], "MPILLM_LAUNCHER": "mpiexec"}
    if kind == "set by hand":
        env["MPILLM_VENV"] = str(found.parent)
    words = ["bash", str(tmp_path / "slurm/run.sh"), "job.toml"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=HANGS, check=False)
    if kind == "none":
        assert (done.returncode, "no virtual environment at" in done.stderr) == (2, True)
    else:
        assert done.returncode == 0, done.stderr
        assert "mpiexec -n 1 python -m mpillm run job.toml" in done.stderr
