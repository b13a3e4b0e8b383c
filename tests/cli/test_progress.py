"""What is seen of a run while it goes on, on a terminal and elsewhere, and what is said to a wrong command."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mpillm import cli
from mpillm.cli import progress, terminal
from mpillm.cli.console import Console
from mpillm.cli.streams import Unfailing
from mpillm.run.progress import ProgressState, Slowest
from tests.conftest import Mpi, clean_environment, run_bounded
from tests.e2e.jobs import CHAT, command, mixed_lines, write_lines


def state(tokens: int, left: float | None = None) -> ProgressState:
    return ProgressState(tokens, hits=0.5, stalled=0.25, waited=0.0, left=left)


def test_lines_come_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    said: list[str] = []
    lines = progress.ProgressLines(40, said.append, 0, progress.Rates())
    for step in range(1, 13):
        now[0] += 1.0
        lines.update(1, lambda step=step: state(100 * step, left=40.0 - step))  # type: ignore[misc]
    assert said == [
        "5 of 40 requests (12 %), 100 tokens/s (100 now), 00:35 left, hits 50 %, waits for disk 25 %",
        "10 of 40 requests (25 %), 100 tokens/s (100 now), 00:30 left, hits 50 %, waits for disk 25 %",
    ]


def test_a_run_that_goes_on_counts_what_was_answered_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    said: list[str] = []
    lines = progress.ProgressLines(40, said.append, 20, progress.Rates(5000))
    now[0] += 5.0
    lines.update(0, lambda: state(5500))
    now[0] += 5.0
    lines.update(4, lambda: state(6000, left=40.0))
    assert [line.split(", hits")[0] for line in said] == [
        "20 of 40 requests (50 %), 100 tokens/s (100 now)",
        "24 of 40 requests (60 %), 100 tokens/s (100 now), 00:40 left",
    ]


def test_the_rate_of_now_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    rates, tokens = progress.Rates(), 0
    for second in range(1, 101):
        now[0], tokens = float(second), tokens + (10 if second <= 50 else 90)
        rates.add(tokens)
    assert str(rates) == "50 tokens/s (90 now)"


def test_what_there_is_no_room_for_is_left_out() -> None:
    """The end of a live line would be cut off."""
    full = ", hits 50 %, waits for disk 25 %"
    assert progress._waits_and_drafts(state(1)) == progress._waits_and_drafts(state(1), len(full)) == full
    assert progress._waits_and_drafts(state(1), len(full) - 1) == ", hits 50 %"
    assert not progress._waits_and_drafts(state(1), 5)


@pytest.mark.parametrize(
    "words", [[], ["models"], ["plan", "--model", str(CHAT), "--ranks", "4"], ["run", "-h"]]
)
def test_nothing_is_wider_than_80_columns(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.suppress(SystemExit):
        assert cli.main(words) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) > 10
    assert [line for line in shown if len(line) > 80] == []


def test_few_accepted_drafts_are_not_told() -> None:
    """1.04 tokens a pass would read 1.0."""
    per_pass = [replace(state(1), per_pass=per_pass) for per_pass in (None, 1.04, 1.25)]
    plain = progress._waits_and_drafts(state(1))
    assert [progress._waits_and_drafts(one) for one in per_pass] == [
        plain, plain, plain.replace(", waits", ", 1.2 tokens/pass, waits"),
    ]  # fmt: skip


def test_the_slowest_rank_is_named() -> None:
    slowed = replace(state(1), slowest=Slowest("rank 2 on pi3", 0.93))
    assert progress._waits_and_drafts(slowed) == (
        ", hits 50 %, slowest: rank 2 on pi3 (busy 93 %), waits for disk 25 %"
    )


def test_no_live_line_of_no_requests(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console._live = True
    for total in (0, 2):
        with console.requests(total, 0, 0, time.monotonic()) as bar:
            bar.update(total, lambda: state(5))
        assert ("requests" in capsys.readouterr().err) == (total > 0)


def test_after_a_lost_rank_the_time_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And so does the rate over all of the run."""
    console = Console()
    console._live = True
    now = time.monotonic()
    with console.requests(9, 0, 100, now):
        monkeypatch.setattr(time, "monotonic", lambda: now + 100)
    with console.requests(9, 3, 500, now) as bar:
        bar.update(1, lambda: state(1100))
    shown = capsys.readouterr().err.split("\r")[-1]
    assert "4/9 requests" in shown
    assert "[01:40" in shown
    assert " 10 tokens/s" in shown


def test_a_rank_that_replaces_rank_0_counts_the_time_from_the_start_of_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its rate is that of what it has led."""
    console = Console()
    console._live = True
    with console.requests(9, 3, 0, time.monotonic() - 100) as bar:
        bar.update(1, lambda: state(5))
    assert re.search(r"4/9 requests .*\[01:40.*, \d{2,} tokens/s", capsys.readouterr().err.split("\r")[-1])


def test_a_sentence_does_not_go_on_with_a_live_line() -> None:
    shown = io.StringIO()
    stream = Unfailing(shown)
    for text in (
        "\r1/9 requests",
        "mpillm: A rank was lost.",
        "\n",
        "\r2/9",
        "\r",
        "mpillm: Again.\n",
        "mpillm: b\n",
    ):
        stream.write(text)
    assert shown.getvalue() == "\r1/9 requests\nmpillm: A rank was lost.\n\r2/9\rmpillm: Again.\nmpillm: b\n"


def test_a_sentence_does_not_go_on_with_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same terminal; only a line without output, as that of `^C`, is emptied."""
    monkeypatch.setattr(terminal, "columns", lambda stream: 10)
    screen = io.StringIO()
    out = Unfailing(screen)
    error = Unfailing(screen, beside=out)
    out.write("The sea")
    error.write("mpillm: a\n")
    out.write("\n")
    error.write("mpillm: b\n")
    assert screen.getvalue() == f"The sea\nmpillm: a\n\n\r{' ' * 9}\rmpillm: b\n"


class Pipe(io.StringIO):
    """A pipe to a launcher."""

    def fileno(self) -> int:
        return 2


def test_sentences_break_between_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, also on that of another user, as after su; what else is printed is left as it is."""
    sentence, other = "mpillm run: " + " ".join(["sentence"] * 12), "other " * 30
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, 60, 0, 0))
    with open(follower, "w") as stream:
        stream.write("^C")  # of the terminal
        Unfailing(stream).write(f"{sentence}\n")
        Unfailing(stream).flush()
        (tmp_path / "2").symlink_to(os.ttyname(follower))  # as /proc shows the launcher's
        shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert shown.startswith(f"^C\r{' ' * 59}\rmpillm run: "), "a line of its own"
    monkeypatch.setattr(terminal, "_launcher_streams", lambda: str(tmp_path))
    pipe = Pipe()
    Unfailing(pipe).write(sentence)
    Unfailing(pipe).write(other)
    for lines, width in ((shown.splitlines(), 60), (pipe.getvalue().removesuffix(other).splitlines(), 80)):
        lines = [line for line in lines if line.strip(" ^C")]
        assert " ".join(map(str.strip, lines)).startswith(sentence)
        assert max(map(len, lines)) <= width
        assert len(lines[0]) > width - 10
    assert pipe.getvalue().endswith(other)


def on_a_terminal(words: list[str | Path], env: dict[str, str]) -> str:
    """What a command shows on a terminal of 80 columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with subprocess.Popen(words, stdin=follower, stdout=follower, stderr=follower, env=env) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                part = os.read(leader, 1 << 16)
            except OSError:  # nobody has it open any more
                break
            shown += part
        assert process.wait() == 0, shown
    os.close(leader)
    return shown.decode(errors="replace")


@pytest.mark.mpiexec
def test_a_terminal_shows_a_live_line_and_ends_with_the_summary(mpi: Mpi, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(200, tokens=24))
    shown = on_a_terminal(mpi.command(2, *command(source, tmp_path / "out")), mpi.environment())
    assert re.search(r"\r\s*\d+/200 requests\s+\d+% \[00:0\d<[\d:]+, \d+ tokens/s", shown), shown
    assert re.search(r"\r\s*0/200 requests\s+0% \[00:0\d[],]", shown), (
        shown
    )  # nothing tells yet how much time is left
    lines = [line for line in shown.splitlines() if line.strip()]
    assert lines[-2:] == ["mpillm: The results are in", f"  {tmp_path}/out/results.jsonl."], (
        "a path is not broken"
    )
    answers = [number for number, line in enumerate(lines) if line.startswith(("r0: ", "r1: ", "r2: "))]
    summary = [number for number, line in enumerate(lines) if line.startswith("mpillm: 200 requests: ")]
    assert len(answers) >= 3
    assert max(answers) < min(summary)
    assert max(len(line) for line in lines[min(summary) : -1]) <= 80, lines


@pytest.mark.mpiexec
def test_the_summary_is_the_last_thing_in_a_pipe(mpi: Mpi, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(6))
    words = " ".join(f"'{word}'" for word in mpi.command(2, *command(source, tmp_path / "out")))
    done = run_bounded(["bash", "-c", f"{words} 2>&1 | cat"], env=mpi.environment())
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("mpillm: The results are in ")
    assert sum(re.match(r"r\d: ", line) is not None for line in lines) == 6
    assert re.search(r"^r2: logprob -\d+\.\d{4} of \d+ tokens: ", done.stdout, flags=re.M)
    assert re.search(r"^r3: embedding of 24 values: ", done.stdout, flags=re.M)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "--max-tokens", "5"], "there is no option --max-tokens; type --set sampling.max_tokens=5"),
        (
            ["plan", "--temperature=0.5"],
            "there is no option --temperature; type --set sampling.temperature=0.5",
        ),
        (["run", "--nonsense", "5"], "there is no option --nonsense; mpillm run --help lists all"),
    ],
)
def test_an_option_that_is_a_key(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prompts.jsonl", "rows.csv", "rows.parquet", "prompts.jsonl.gz"])
def test_an_input_in_place_of_a_job(name: str) -> None:
    done = run_bounded([sys.executable, "-m", "mpillm", "plan", name])
    assert done.returncode == 2
    assert f"{name} is not a job file (TOML); to run its requests, type --input {name}." in done.stderr


def test_without_anything_help_says_what_to_do_next() -> None:
    done = run_bounded([sys.executable, "-m", "mpillm"])
    assert done.returncode == 0
    assert len(done.stdout.partition("next steps:\n")[2].splitlines()) == 3


TWICE = """
import sys
from mpillm.cli import main

def job(name, *more):
    return ["run", "--model", sys.argv[1], "--input", sys.argv[2], "--output", f"{sys.argv[3]}/{name}", *more]

assert [main(job("a")), main(job("b", "--set", "no.key=1")), main(job("c"))] == [0, 2, 0]
"""


@pytest.mark.mpiexec
@pytest.mark.parametrize("ranks", [1, 2])
def test_main_can_be_called_again(openmpi: Mpi, ranks: int, tmp_path: Path) -> None:
    source, program = write_lines(tmp_path / "in.jsonl", mixed_lines(4)), tmp_path / "twice.py"
    program.write_text(TWICE)
    if ranks == 1:
        env = clean_environment(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
        done = run_bounded([sys.executable, program, CHAT, source, tmp_path], env=env)
    else:
        done = openmpi.run(2, program, CHAT, source, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a/results.jsonl").read_bytes() == (tmp_path / "c/results.jsonl").read_bytes()
