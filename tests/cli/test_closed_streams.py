"""Every command ends with the same code, whatever becomes of what it prints: full devices, closed streams, `| head`."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from mpillm.cli.arguments import command_parser
from tests.conftest import HANGS, clean_environment
from tests.e2e.jobs import CHAT, command, mixed_lines, write_lines

ENDINGS = (">/dev/full 2>/dev/full", "<&- >&- 2>&-", "2>&1 | head -c 1 >/dev/null")
# What each is asked, in a folder with the outputs `one` and `two` of a job; NUMBER is another one for each ending.
COMMANDS = {
    "plan": (f"plan --model {CHAT}", 0),
    "pack": (f"pack {CHAT} packed-NUMBER --weights q8_0", 0),
    "models": ("models", 0),
    "pull": ("pull nothing-like-this", 2),
    "init": ("init job job-NUMBER", 0),
    "report": ("report one", 0),
    "export": ("export one", 0),
    "status": ("status one", 0),
    "watch": ("watch one", 0),
    "compare": ("compare one two", 0),
    "merge": ("merge one two --output merged-NUMBER", 0),
    "chat": (f"chat --model {CHAT}", 0),
    "doctor": (f"doctor --model {CHAT}", 0),
    "launch": (f"launch -n 1 run --model {CHAT} --input in.jsonl --output launched-NUMBER", 0),
    "bench": ("bench --what kernels --synthetic nothing", 2),
    "worker": ("worker --port 70000", 2),
    "lm-eval": ("lm-eval --model_args model=nothing,ranks=1 --tasks none", 2),
    "--help": ("--help", 0),
    "--version": ("--version", 0),
    "--nonsense": ("--nonsense", 2),
}
ONCE = "lm-eval"  # whose imports take seconds: one ending has to do
# run is in test_display.py, with its results; serve does not end by itself; ranks is what `LLM` starts.
APART = {"run", "serve", "ranks"}


def environment() -> dict[str, str]:
    return clean_environment(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")


def bash(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an input, and two outputs of it."""
    made = tmp_path_factory.mktemp("streams")
    source = write_lines(made / "in.jsonl", mixed_lines(2))
    for name in ("one", "two"):
        done = bash(" ".join([sys.executable, *command(source, made / name)]), made)
        assert done.returncode == 0, done.stderr
    return made


def test_each_command_is_tried() -> None:
    (commands,) = (action.choices for action in command_parser()._actions if action.dest == "command")
    assert commands is not None
    assert set(commands) <= COMMANDS.keys() | APART


@pytest.mark.parametrize("name", COMMANDS)
def test_the_exit_code_is_that_of_the_work(name: str, folder: Path) -> None:
    words, code = COMMANDS[name]
    # Commands write alike to a full device and to a closed pipe, so each is tried with one of these.
    other = ENDINGS[2 * (list(COMMANDS).index(name) % 2)]
    endings = [ENDINGS[1]] if name == ONCE else [ENDINGS[1], other]
    lines = (
        f"{sys.executable} -m mpillm {words.replace('NUMBER', str(number))} {ending}; echo ${{PIPESTATUS[0]}}"
        for number, ending in enumerate(endings)
    )
    done = bash("\n".join(lines), folder)
    assert done.stdout.split() == [str(code)] * len(endings), done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("ending", ENDINGS)
def test_serve_answers_and_ends(ending: str, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"serve --model {CHAT} --port {port} --data data-{port}"
    line = f"{{ {sys.executable} -m mpillm {words} & echo $! >pid-{port}; wait $!; echo $? >code-{port}; }} {ending}"
    with subprocess.Popen(
        ["bash", "-c", line], cwd=folder, env=environment(), stdin=subprocess.DEVNULL
    ) as process:
        while not answers(port):
            assert process.poll() is None
            time.sleep(0.1)
        pid = int((folder / f"pid-{port}").read_text())
        subprocess.run(["kill", f"-{signal.SIGTERM}", str(pid)], check=True)
    assert (folder / f"code-{port}").read_text() == "0\n"


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as found:
        return bool(found.status == 200)
    return False
