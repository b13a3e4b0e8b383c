"""What is installed is what is there: packages, job files, and the ways in."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, run_bounded

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    there = {
        str(path.parent.relative_to(ROOT)).replace("/", ".") for path in ROOT.glob("mpillm/**/__init__.py")
    }
    assert listed == there | {"mpillm.jobs"}


def test_every_job_file_is_installed() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["mpillm.jobs"]
    taken = {path for pattern in patterns for path in (ROOT / "jobs").glob(pattern)}
    assert taken == {path for path in (ROOT / "jobs").iterdir() if path.is_file()}


def test_the_command_exists() -> None:
    module, _, function = PROJECT["project"]["scripts"]["mpillm"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_a_source_archive_has_what_a_build_needs(tmp_path: Path) -> None:
    """Without the headers of the kernels, `pip install` from an archive would fall back to NumPy."""
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    copied = tmp_path / "checkout"
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    names = [name for name in listed if name.startswith(("cython/", "mpillm/", "jobs/")) or "/" not in name]
    if not names:  # no git here: the archive itself is what is tested
        names = [str(path.relative_to(ROOT)) for path in ROOT.glob("cython/**/*") if path.is_file()]
    for name in names:
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_bytes((ROOT / name).read_bytes())
    done = run_bounded([sys.executable, "-c", code], 120, cwd=copied)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    packed = run_bounded(["tar", "tzf", archive]).stdout.split()
    inside = {name.partition("/")[2] for name in packed}
    assert {name for name in names if name.startswith(("cython/", "mpillm/", "jobs/"))} <= inside
