"""Files of a finished run that may not be read, or are damaged: a sentence names the file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import clean_environment, run_bounded
from tests.job_helpers import CHAT

POWERLESS = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"]  # root without its rights


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "in.jsonl").write_text(f"{json.dumps({'prompt': 'a', 'max_tokens': 2})}\n")
    words = ["run", "--model", CHAT, "--input", folder / "in.jsonl", "--output", folder / "out"]
    assert mpillm(*words).returncode == 0
    return folder


def mpillm(*words: object) -> subprocess.CompletedProcess[str]:
    started: list[str | Path] = [sys.executable, "-m", "mpillm", *map(str, words)]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv")
        started = [*POWERLESS, *started]
    return run_bounded(started, env=clean_environment())


@pytest.mark.parametrize(
    ("name", "command", "said"),
    [
        ("results.h5", "report {}", "results.h5 cannot be read: Permission denied."),
        ("results.h5", "compare {other} {}", "results.h5 cannot be read: Permission denied."),
        ("results.h5", "merge {other} {} --output {new}", "results.h5 cannot be read: Permission denied."),
        ("timings.h5", "merge {other} {} -o {new}", "timings.h5 cannot be read: Permission denied."),
        ("results.jsonl", "merge {} -o {new}", "results.jsonl cannot be used: Permission denied."),
        ("results.jsonl", "export {} -o {new}.csv", "results.jsonl cannot be used: Permission denied."),
        ("journal", "status {}", "journal cannot be read: Permission denied."),
        (".", "watch {}", "cannot be read: Permission denied."),
        (".", "report {}", "report.json cannot be read: Permission denied."),
    ],
)
def test_what_may_not_be_read(finished: Path, tmp_path: Path, name: str, command: str, said: str) -> None:
    output, new = tmp_path / "out", tmp_path / "new"
    shutil.copytree(finished / "out", output)
    (output / name).chmod(0)
    try:
        words = command.format(output, other=finished / "out", new=new).split()
        done = mpillm(*words)
    finally:
        output.chmod(0o700)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(f"{said}\n")
    assert done.stderr.count("\n") == 1
    assert f" {output}" in done.stderr
    assert not (tmp_path / "new.csv").exists()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run --model {chat} --input {loop} --output {new}", "The input {loop} does not exist; it is a symbolic link"),
        ("run --model {chat} --input {source} --output {loop}", "The output {loop} is a symbolic link that leads now"),
        ("run --model {chat} --input {source} --output {loop}/new", "The output {loop}/new cannot be written: Too m"),
        ("run --model {loop} --input {source} --output {new}", "The model {loop} does not exist; it is a symbolic"),
        ("pack {chat} {loop}", "{loop} is a symbolic link that leads nowhere; give a directory"),
        ("report {loop}", "The directory {loop} does not exist; it is a symbolic link that leads nowhere."),
        ("status {loop}", "{loop} cannot be read: Too many levels of symbolic links."),
        ("run --model {chat} --input {source} --output {new} --trace {pipe}", "--trace {pipe} cannot be written"),
        ("run --model {chat} --input {pipe} --output {new}", "The input {pipe} is not a file; give a file of requests"),
        ("plan --model {chat} --input {pipe}", "The input {pipe} is not a file; give a file of requests"),
    ],
)  # fmt: skip
def test_links_in_a_circle_and_pipes(finished: Path, tmp_path: Path, words: str, said: str) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(loop)
    os.mkfifo(tmp_path / "pipe")
    names = {
        "chat": CHAT,
        "loop": loop,
        "new": tmp_path / "new",
        "pipe": tmp_path / "pipe",
        "source": finished / "in.jsonl",
    }
    done = mpillm(*words.format(**names).split())
    assert done.returncode == 2
    assert said.format(**names) in done.stderr
    assert done.stderr.count("\n") == 1
    assert loop.is_symlink()


@pytest.mark.parametrize("name", ["results.h5", "timings.h5"])
def test_what_is_damaged(finished: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished / "out", output)
    os.truncate(output / name, 1000)
    done = mpillm("merge", finished / "out", output, "--output", tmp_path / "new")
    assert done.returncode == 2
    assert done.stderr == f"mpillm: {output / name} is damaged; run the command that made it once more.\n"
    again = ["run", "--model", CHAT, "--input", finished / "in.jsonl", "--output", output]
    assert mpillm(*again).returncode == 0
    assert mpillm("merge", finished / "out", output, "--output", tmp_path / "new").returncode == 0
