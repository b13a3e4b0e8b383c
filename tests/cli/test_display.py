"""Printing never changes the exit code or the results, and what is printed cannot control a terminal."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mpillm.cli import console
from mpillm.cli.console import Console
from mpillm.cli.streams import Unfailing, unfailing, visible
from mpillm.store import report
from tests.conftest import HANGS, clean_environment
from tests.e2e.jobs import command, results, write_lines
from tests.store.test_report import made

LINES = [
    {"custom_id": "snow\u2603man \u4f60\u597d", "prompt": "the quick", "max_tokens": 2},
    {"custom_id": "evil\x1b[2J\x1b]0;title\x07\x9b31m\r\nend\u202etxt", "prompt": "brown", "max_tokens": 2},
    {"custom_id": "bad\x1b[31m", "prompt": 5},
]


def shell(line: str, source: Path, output: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run a job of one rank by a shell line, in which RUN stands for it."""
    words = " ".join(f"'{word}'" for word in [sys.executable, *command(source, output)])
    return subprocess.run(
        ["bash", "-c", line.replace("RUN", words)],
        env=clean_environment(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", **env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=HANGS,
        check=False,
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", LINES)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "encoding"),
    [
        ("RUN", "ascii"),
        ("RUN 2>&1 | true; exit ${PIPESTATUS[0]}", "utf-8"),
        ("RUN >/dev/full", "latin-1"),
        ("RUN >/dev/full 2>/dev/full", "utf-8"),
        ("RUN 2>&-", "utf-8"),
        ("RUN <&- >&- 2>&-", "utf-8"),
    ],
)
def test_the_exit_code_is_that_of_the_work(line: str, encoding: str, source: Path, tmp_path: Path) -> None:
    done = shell(line, source, tmp_path / "out", PYTHONIOENCODING=encoding)
    assert done.returncode == 1, done.stderr  # one line is bad
    found = results(tmp_path / "out")
    assert [one["custom_id"] for one in found] == [one["custom_id"] for one in LINES]
    assert [one["response"]["status_code"] for one in found] == [200, 200, 400]


def test_what_is_shown(source: Path, tmp_path: Path) -> None:
    done = shell("RUN", source, tmp_path / "out")
    shown = (done.stdout + done.stderr).decode()
    assert not set(shown) & set("\x1b\x07\x9b\u202e")
    assert "snow\u2603man \u4f60\u597d: " in shown
    assert r"evil\x1b[2J\x1b]0;title\x07\x9b31m\r\nend\u202etxt: " in shown
    latin = shell("RUN", source, tmp_path / "again", PYTHONIOENCODING="latin-1").stdout.decode("latin-1")
    assert "snow?man ??: " in latin


def test_visible() -> None:
    plain = "caf\u00e9 \u4f60 \U0001f468\u200d\U0001f469 \u00a0\u3000\ufdd0"
    assert visible(plain) == plain
    assert visible("a\tb\nc\rd\x00\x7f\x85\u2028\u2066\ud800") == r"a\tb\nc\rd\x00\x7f\x85\u2028\u2066\ud800"
    assert visible("a\tb\nc\rd\x1b", keep="\t\n\r") == "a\tb\nc\rd\\x1b"
    assert visible("\udce9") == r"\xe9", "a byte of a path that is not UTF-8"
    for text in json.loads(json.dumps(list(map(chr, range(0x3000))))):
        assert visible(text).isprintable() or text.isspace() or ord(text) > 0x9F


def test_names_in_quotes_are_shown_as_others() -> None:
    """A sentence quotes what was typed with repr, which has its own escapes for bytes that are not UTF-8."""
    shown = io.StringIO()
    Unfailing(shown).write(
        f"mpillm: There is no model {chr(0xDCFF) + 'm'!r} in {chr(0xDCE9)}; no {chr(92) + 'udcff'!r}.\n"
    )
    Unfailing(shown).write(r"an answer has \udcff" + "\n")
    assert shown.getvalue() == (
        r"mpillm: There is no model '\xffm' in \xe9; no '\\udcff'." + "\n" + r"an answer has \udcff" + "\n"
    )


def test_what_cannot_be_shown_is_no_error_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a line of the results that is of no form that is known."""
    source = tmp_path / "results.jsonl"
    line = {"custom_id": "odd", "response": {"body": {"choices": [{"text": [1]}], "usage": {}}}}
    source.write_text(json.dumps(line) + "\n")
    Console().finish(made(), tmp_path)
    said = capsys.readouterr().err
    assert f"The answers in {source} cannot be printed" in said


def test_choices_are_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Whether they are texts or tokens."""
    choices = [{"text": " yes", "probability": 0.75}, {"text": [5, 9], "probability": 0.25}]
    body = {"choices": choices, "best": {"logprob": 0}, "answer": " yes", "usage": {"prompt_tokens": 3}}
    (tmp_path / "results.jsonl").write_text(
        json.dumps({"custom_id": "one", "response": {"body": body}}) + "\n"
    )
    console._show_answers(tmp_path / "results.jsonl", report.Requests(total=1, ok=1, errors=0))
    assert capsys.readouterr().out == "one: 0.75 for yes | 0.25 for [5, 9]\n"


@pytest.mark.parametrize("failed", [1, 5])
def test_of_many_answers_an_error_is_shown(
    failed: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One of the first, or else the first of the others."""
    source, answer = tmp_path / "results.jsonl", {"object": "list", "data": [{"embedding": [0.5]}]}
    with source.open("w") as file:
        for number in range(10):
            code, body = (400, {"error": {"message": "Line is bad."}}) if number == failed else (200, answer)
            line = {"custom_id": f"r{number}", "response": {"status_code": code, "body": body}}
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
    console._show_answers(source, report.Requests(total=10, ok=9, errors=1))
    shown = capsys.readouterr().out.splitlines()
    assert f"r{failed}: ERROR: Line is bad." in shown
    assert [line.split(":")[0] for line in shown[:-1]] == ["r0", "r1", "r2", *(["r5"] if failed == 5 else [])]
    assert shown[-1] == f"... and {11 - len(shown)} more in {source}"


class Broken(io.StringIO):
    """A stream that fails after some characters."""

    def write(self, text: str, /) -> int:
        if self.tell() > 10:
            raise BrokenPipeError
        return super().write(text)


def test_a_stream_that_breaks_is_left_alone() -> None:
    inner = Broken()
    stream = Unfailing(inner)
    for _ in range(5):
        assert stream.write("123456") == 6
    stream.flush()
    assert inner.getvalue() == "123456" * 2
    assert not stream.isatty()
    gone = Unfailing(None)
    assert gone.write("x") == 1
    with pytest.raises(io.UnsupportedOperation):
        gone.fileno()


def test_streams_are_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with unfailing():
        print("a\x1bb")
        print("\u2603", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("a\\x1bb\n", "\u2603\n")
