"""A work's list of steps has an end, in release builds too."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CORE = Path(__file__).resolve().parents[2] / "cython" / "core"


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
@pytest.mark.parametrize("build", [[], ["-DNDEBUG"]], ids=["debug", "release"])
def test_a_step_too_many_is_an_error_in_every_build(build: list[str], tmp_path: Path) -> None:
    program = tmp_path / "steps"
    sources = [Path(__file__).with_name("steps.c"), CORE / "run.c"]
    flags = ["-std=c11", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror", *build]
    subprocess.run(["gcc", *flags, "-I", CORE, *sources, "-o", program], check=True, timeout=100)
    done = subprocess.run([program], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
