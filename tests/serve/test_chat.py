"""`mpillm chat`: turns, commands and Ctrl-C, as typed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from mpillm.cli.streams import visible
from tests.conftest import Mpi, clean_environment, run_bounded
from tests.job_helpers import CHAT

PROMPT = b"\x1b[?2004h> "  # as readline writes it: from here on, mark what is pasted
XTERM = clean_environment(TERM="xterm")
GNU = importlib.util.find_spec("readline") and "libedit" not in str(
    importlib.import_module("readline").__doc__
)
with_readline = pytest.mark.skipif(not GNU, reason="this Python is without GNU readline")
SETTINGS = ["--set", "sampling.max_tokens=7"]


def answers(folder: Path, *conversations: list[str]) -> list[str]:
    """What a run answers to conversations of user and assistant in turn, a leading "S:" being the system's."""
    source = folder / "in.jsonl"
    with open(source, "w") as file:
        for number, texts in enumerate(conversations):
            system = [text[2:] for text in texts if text.startswith("S:")]
            turns = [text for text in texts if not text.startswith("S:")]
            messages = [{"role": "system", "content": text} for text in system]
            messages += [
                {"role": ("user", "assistant")[index % 2], "content": text}
                for index, text in enumerate(turns)
            ]
            file.write(json.dumps({"messages": messages, "custom_id": str(number)}) + "\n")
    output = folder / f"out {time.monotonic()}"
    words = ["run", "--model", CHAT, "--input", source, "--output", output, *SETTINGS]
    assert run_bounded([sys.executable, "-m", "mpillm", *words], env=clean_environment()).returncode == 0
    lines = (output / "results.jsonl").read_text().splitlines()
    return [json.loads(line)["response"]["body"]["choices"][0]["message"]["content"] for line in lines]


@pytest.mark.mpiexec
def test_turns_from_a_pipe(openmpi: Mpi, tmp_path: Path) -> None:
    (first, alone) = answers(tmp_path, ["the fox"], ["S:be kind", "over the dog"])
    (second,) = answers(tmp_path, ["the fox", first, "over the dog"])
    core = str(min(os.sched_getaffinity(0)))
    typed = "the fox\nover the dog\n/retry\n/unknown\n\n/system be kind\nover the dog\n/exit\nnever\n"
    for command, env, help_ends in (
        ([sys.executable], clean_environment(), "stop the answer; between answers, leave"),
        (["taskset", "-c", core, *openmpi.command(2)], openmpi.environment(), "Ctrl-C         end mpiexec"),
    ):
        words = [str(word) for word in [*command, "-m", "mpillm", "chat", "--model", CHAT, *SETTINGS]]
        done = subprocess.run(words, input=typed, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said, help_text, last = done.stdout.partition("/help  ")
        assert said == visible(f"{first}\n{second}\n{second}\n", "\n")  # control characters are shown as such
        assert help_text
        assert last.endswith(visible(f"{help_ends}\n{alone}\n", "\n"))
        assert "Talking to chat" in done.stderr
        assert ("1 of 2 ranks is kept in reserve" in done.stderr) == (words[0] == "taskset")


@pytest.mark.mpiexec
@pytest.mark.parametrize("kind", ["pipe", "file", "null"])
def test_the_end_of_the_input_behind_a_launcher(mpi: Mpi, tmp_path: Path, kind: str) -> None:
    typed = "" if kind == "null" else "the fox\n"
    (tmp_path / "typed").write_text(typed)
    words = [str(word) for word in [*mpi.command(2), "-m", "mpillm", "chat", "--model", CHAT, *SETTINGS]]
    source = {"file": str(tmp_path / "typed"), "null": os.devnull}.get(kind)
    line = f"exec {shlex.join(words)} < {source}" if source else f"printf 'the fox\\n' | {shlex.join(words)}"
    done = run_bounded(["sh", "-c", line], env=mpi.environment())
    assert done.returncode == 0, done.stderr
    (first,) = answers(tmp_path, ["the fox"])
    assert done.stdout == (visible(f"{first}\n", "\n") if typed else "") + "\n"


@with_readline
def test_keys_history_and_pasted_lines_on_a_terminal(tmp_path: Path) -> None:
    """Home, an arrow and a text of two lines are what they are elsewhere, and the end leaves the terminal as it was."""
    (first,) = answers(tmp_path, ["the fox"])
    (second,) = answers(tmp_path, ["the fox", first, "the fox"])
    (third,) = answers(tmp_path, ["the fox", first, "the fox", second, "over\nthe dog"])
    terminal, inside = pty.openpty()
    before = termios.tcgetattr(inside)
    words = [sys.executable, "-m", "mpillm", "chat", "--model", str(CHAT), *SETTINGS]
    keys = [b"fox\x01the \r", b"\x1b[A\r", b"\x1b[200~over\nthe dog\x1b[201~\r"]
    with subprocess.Popen(words, stdin=inside, stdout=inside, stderr=subprocess.PIPE, env=XTERM) as process:
        seen = b""
        for answer, typed in zip(("", first, second), keys, strict=True):
            shown = visible(answer).encode() + b"\r\n"
            while not (seen.endswith(PROMPT) and (not answer or shown in seen)):
                seen += os.read(terminal, 4096)
            seen = b""
            os.write(terminal, typed)
        while not (seen.endswith(PROMPT) and visible(third).encode() + b"\r\n" in seen):
            seen += os.read(terminal, 4096)
        process.send_signal(signal.SIGINT)  # while readline waits for a line
        assert process.wait() == 0
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert said.count("cut after 7 tokens; --set sampling.max_tokens=28") == 1
    assert termios.tcgetattr(inside) == before
    os.close(inside)
    os.close(terminal)


@with_readline
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_an_answer_and_then_the_conversation(first: signal.Signals, tmp_path: Path) -> None:
    """SIGTERM, into which Open MPI's mpiexec turns Ctrl-C, ends both."""
    terminal, inside = pty.openpty()
    words = ["-m", "mpillm", "chat", "--model", str(CHAT), "--set", "sampling.max_tokens=480"]
    with subprocess.Popen(
        [sys.executable, *words], stdin=inside, stdout=inside, stderr=subprocess.PIPE, env=XTERM
    ) as process:
        os.close(inside)
        seen = b""

        def wait_for(text: bytes, count: int = 1) -> None:
            nonlocal seen
            while seen.count(text) < count:
                seen += os.read(terminal, 4096)

        wait_for(PROMPT)
        os.write(terminal, b"the fox\n")
        while len(seen) < 60:
            seen += os.read(terminal, 4096)
        process.send_signal(first)
        if first == signal.SIGINT:
            wait_for(PROMPT, 2)  # an answer that is stopped is followed by the next prompt
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
        assert process.wait() == 0
        with contextlib.suppress(OSError):  # at the end; a read gives a part of what the terminal has shown
            while more := os.read(terminal, 4096):
                seen += more
        assert seen.endswith(b"\r\n")
    os.close(terminal)


def test_ctrl_c_before_the_first_token_stops_the_answer_alone(tmp_path: Path) -> None:
    """Not the conversation, though the template is still being filled in."""
    (answer,) = answers(tmp_path, ["over the dog"])
    program = """
import os, signal, sys, threading
from mpillm.cli import main
from mpillm.serve import chat
prepare, interrupt, seen = chat.prepare, chat.Conversation.interrupt, threading.Event()
def prepared(*words):
    if not seen.is_set():
        os.kill(os.getpid(), signal.SIGINT)
        seen.wait()
    return prepare(*words)
def interrupted(conversation):
    interrupt(conversation)
    seen.set()
chat.prepare, chat.Conversation.interrupt = prepared, interrupted
sys.exit(main(sys.argv[1:]))
"""
    words = [sys.executable, "-c", program, "chat", "--model", str(CHAT), *SETTINGS]
    typed = "the fox\nover the dog\n"
    done = subprocess.run(
        words, input=typed, env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, visible(f"\n{answer}\n\n", "\n")), done.stderr


@pytest.mark.mpiexec
def test_a_terminal_behind_a_launcher_is_asked(mpi: Mpi, tmp_path: Path) -> None:
    """Whoever sits there sees when to type."""
    (answer,) = answers(tmp_path, ["the fox"])
    terminal, inside = pty.openpty()
    # Open MPI's mpiexec reads only the terminal whose foreground it is.
    words = [
        "setsid",
        "--ctty",
        "--wait",
        *map(str, mpi.command(2)),
        "-m",
        "mpillm",
        "chat",
        "--model",
        str(CHAT),
    ]
    with subprocess.Popen(
        [*words, *SETTINGS],
        stdin=inside,
        stdout=inside,
        stderr=subprocess.PIPE,
        env=mpi.environment(TERM="xterm"),
    ) as process:
        os.close(inside)
        seen = b""
        for typed, shown in ((b"the fox\n", "> "), (b"/exit\n", f"{visible(answer)}\r\n> ")):
            while not seen.endswith(shown.encode()):
                seen += os.read(terminal, 4096)
            os.write(terminal, typed)
        assert process.wait() == 0
    os.close(terminal)


def test_a_full_context(tmp_path: Path) -> None:
    """An answer that is cut and a message that has no room say how to begin anew, which works."""
    typed = "the fox\nthe dog\n/reset\nthe fox\n"
    words = [*SETTINGS, "--set", "memory.max_context=16", "--set", "sampling.max_tokens=40"]
    command = [sys.executable, "-m", "mpillm", "chat", "--model", str(CHAT), *words]
    done = subprocess.run(
        command, input=typed, env=clean_environment(), capture_output=True, text=True, check=False
    )
    first, _, last = done.stdout.partition("\n")
    assert "context is 16 tokens; shorten it or raise memory.max_context; /reset starts a new" in done.stdout
    assert last.endswith(f"{first}\n\n")
    assert done.stderr.count("The answer was cut because the context is full; /reset starts a new") == 2
