"""Running a work: its list of steps has an end, and threads, other callers and forks change nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import HANGS

CORE = Path(__file__).resolve().parents[2] / "cython" / "core"
BUILDS = {"debug": ["-fopenmp"], "release": ["-fopenmp", "-DNDEBUG"], "no OpenMP": ["-DNDEBUG"]}


@pytest.fixture(scope="module", params=list(BUILDS))
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    program = tmp_path_factory.mktemp("run") / "run_checks"
    flags = ["-std=c11", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror", *BUILDS[request.param]]
    sources = [Path(__file__).with_name("run_checks.c"), CORE / "run.c"]
    subprocess.run(["gcc", *flags, "-I", CORE, *sources, "-o", program], check=True, timeout=HANGS)
    return program


@pytest.mark.parametrize(("name", "env"), [
    ("steps", {}),
    ("threads", {}),
    ("threads", {"OMP_WAIT_POLICY": "passive"}),
    ("threads", {"OMP_THREAD_LIMIT": "2"}),  # fewer threads than the call asks for
    ("callers", {}),
    ("forks", {}),
    ("stacks", {"OMP_STACKSIZE": "128k"}),
])  # fmt: skip
def test_run(program: Path, name: str, env: dict[str, str]) -> None:
    done = subprocess.run(
        [program, name], env={**os.environ, **env}, capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert done.returncode == 0, done.stderr
