"""The journal: on disk before it counts, whole or not at all, and of one job only."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpillm.batch.work import Line
from mpillm.errors import Interrupted, OutputError
from mpillm.store.journal import Journal
from mpillm.store.journal_facts import began, finished
from mpillm.store.output import Claim
from mpillm.store.records import Counts, Finished
from tests.conftest import Mount
from tests.job_helpers import lines, result
from tests.store.journals import IDENTITY, NAMES, done, finish


def test_what_was_flushed_is_there_again_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "made/on/the/way"
    with Claim(out) as claim, Journal(claim, IDENTITY, lines(*NAMES)) as journal:
        assert (list(journal.finished()), journal.resumed, journal.damage) == ([], 0, [])
        journal.append(result("b"))
        journal.append(result("a"))
        assert list(journal.finished()) == []
        assert journal.flush() == 2
        assert journal.flush() == 0
        assert list(journal.finished()) == ["b", "a"]
        journal.append(result("c"))  # never flushed
    assert done(out) == ["b", "a"]
    finish(out, "c")
    assert done(out) == ["b", "a", "c"]


def test_a_flush_is_one_write_and_one_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    with Claim(tmp_path) as claim, Journal(claim, IDENTITY, lines(*NAMES)) as journal:
        for name in NAMES:
            journal.append(result(name))
        journal.flush()
    assert len(synced) == 1


def test_what_was_computed_is_noted_without_any_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that is killed while its first answers are long has computed, too."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Claim(tmp_path) as claim, Journal(claim, IDENTITY, lines(*NAMES)) as journal:
        journal.counted = lambda: Counts(1, now[0] - 100, prompt=7, generated=3, shared=0, recomputed=0)
        for _ in range(25):
            assert journal.commit() == 0
            now[0] += 1.0
    with Claim(tmp_path) as claim, Journal(claim, IDENTITY, lines(*NAMES)) as journal:
        assert [count.seconds for count in journal.counts] == [22.0]


def test_another_job_is_refused_with_what_differs(tmp_path: Path) -> None:
    finish(tmp_path, "a")
    for changes, words in [
        ({"sampling.seed": 4}, "sampling.seed was 3 and is 4"),
        ({"sampling.stop": ["b"]}, "sampling.stop was ['a'] and is ['b']"),
        ({"model": "xyz"}, "model was 'abc' and is 'xyz'"),
        ({"new": None}, "new was unset and is None"),
    ]:
        with Claim(tmp_path) as claim, pytest.raises(OutputError) as caught:
            Journal(claim, IDENTITY | changes, lines(*NAMES))
        assert str(caught.value) == (
            f"The output directory {tmp_path} belongs to another job: {words}; change it back or give another output."
        )
    assert done(tmp_path) == ["a"]


def test_lines_may_be_added_anywhere_and_no_line_may_go(tmp_path: Path) -> None:
    finish(tmp_path, "a", "c")
    assert done(tmp_path, of=("new", *NAMES, "newer")) == ["a", "c"]
    for of, words in [
        (("a", "b", "c", "d", "e"), r"its request 1 \(now 'a'\) was changed or removed; restore it or"),
        (
            ("new", "b", "c", "d", "e", "newer"),
            "the line of 'a', which is finished, was changed or removed; restore it",
        ),
        (("new", "a", "b", "c", "newer"), r"its request 5 \(now 'newer'\) was changed or removed"),
        (("new", "a", "b", "c"), "its request 5 was changed or removed"),
    ]:
        with pytest.raises(OutputError, match=words):
            done(tmp_path, of=of)
    changed = [
        Line(1, 0, 0, name, (name if name != "a" else "other").encode()) for name in ("new", *NAMES, "newer")
    ]
    with (
        Claim(tmp_path) as claim,
        pytest.raises(OutputError, match="the line of 'a', which is finished, was changed"),
    ):
        Journal(claim, IDENTITY, changed)


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_journal_that_is_gone_is_noticed(tmp_path: Path, how: str) -> None:
    with Claim(tmp_path) as claim, Journal(claim, IDENTITY, lines(*NAMES)) as journal:
        journal.check()
        journal.path.rename(tmp_path / "away")
        if how == "replaced":
            journal.path.write_bytes((tmp_path / "away").read_bytes())
        with pytest.raises(Interrupted, match="was deleted or replaced during the run; put it back"):
            journal.check()


def test_the_run_remembers_when_it_began(tmp_path: Path) -> None:
    with Claim(tmp_path) as claim:
        first = began(claim)
        Journal(claim, IDENTITY, lines(*NAMES)).close()
        assert began(claim) == first
    with Claim(tmp_path) as claim:
        assert claim.since > first
        assert began(claim) == first


def test_a_full_disk_interrupts_and_the_run_goes_on_when_there_is_space(mounted: Mount) -> None:
    disk = mounted("size=128k")
    out = disk / "out"
    filler = disk / "filler"
    payload = bytes(9000)
    names = tuple(f"r{n}" for n in range(40))
    with Claim(out) as claim, Journal(claim, IDENTITY, lines(*names)) as journal:
        filler.write_bytes(bytes(40_000))
        for name in names:  # one flush for each
            journal.append(result(name, payload))
            try:
                journal.flush()
            except Interrupted as error:
                said = error
                break
        assert "There is no space left for" in str(said)
        assert str(said).endswith(
            "nothing that was finished is lost: free some space and run the same command again."
        )
        assert said.exit_code == 75
        before = len(journal.done)
        filler.unlink()
        assert journal.flush() == 1  # what waited has not been lost
        assert len(journal.done) == before + 1
    with Claim(out) as claim, Journal(claim, IDENTITY, lines(*names)) as journal:
        assert list(journal.finished()) == list(names[: before + 1])
        assert journal.damage == []


def test_a_disk_too_full_to_begin(mounted: Mount) -> None:
    disk = mounted("size=32k")
    (disk / "filler").write_bytes(bytes(16_000))
    with Claim(disk / "out") as claim, pytest.raises(Interrupted, match="no space left"):
        Journal(claim, IDENTITY, lines(*(f"r{n}" for n in range(5000))))
    assert not list((disk / "out").glob("*.tmp"))


def test_a_write_that_fails_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: int) -> None:
        raise OSError(5, "Input/output error")

    with Claim(tmp_path) as claim, Journal(claim, IDENTITY, lines(*NAMES)) as journal:
        journal.append(result("a"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", broken)
            with pytest.raises(OutputError, match="cannot be written: Input/output error"):
                journal.flush()
        assert list(journal.finished()) == []
    assert done(tmp_path) == []


KILLED = """
import os, sys
from pathlib import Path
from mpillm.store.journal import Journal
from mpillm.store.output import Claim
from mpillm.store.records import Result, line_key
from mpillm.batch.work import Line
lines = [Line(n, 0, 0, f"r{n - 1}", f"r{n - 1}".encode()) for n in range(1, 1001)]
journal = Journal(Claim(Path(sys.argv[1])), {"model": "abc"}, lines)
for line in lines:
    name = line.custom_id
    if name not in journal.done:
        journal.append(Result(name, line_key(line), 200, os.urandom(100)))
        journal.flush()
        print(name, flush=True)
"""


def test_a_killed_run_goes_on_with_all_that_it_told(tmp_path: Path) -> None:
    told: list[str] = []
    for count in (3, 7):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, tmp_path / "out"], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            told += [process.stdout.readline().strip() for _ in range(count)]
            process.kill()
            told += process.stdout.read().split()
    names = tuple(f"r{n}" for n in range(1000))
    with Claim(tmp_path / "out") as claim, Journal(claim, {"model": "abc"}, lines(*names)) as journal:
        finished = list(journal.finished())
    assert finished == list(names[: len(finished)])
    assert set(told) <= set(finished)
    assert len(finished) <= len(told) + 2  # at most one for each kill was on disk and not told yet
    assert len(told) == len(set(told))


def test_a_group_goes_to_disk_when_it_is_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the disk, it takes a fiftieth of the time."""
    now = [100.0]

    def slow(_file: int) -> None:
        now[0] += 0.5

    monkeypatch.setattr(os, "fdatasync", slow)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    names = [f"r{number}" for number in range(2000)]
    with Claim(tmp_path) as claim, Journal(claim, IDENTITY, lines(*names)) as journal:
        begun = now[0]
        for name in names:
            journal.append(result(name))
            journal.commit()
            assert len(journal.done) <= names.index(name) + 1
            now[0] += 0.05
        assert 0.015 < journal.seconds / (now[0] - begun) <= 0.025
        journal.flush()
        assert list(journal.finished()) == names


def test_a_fast_disk_is_not_asked_more_often_than_makes_sense(tmp_path: Path) -> None:
    with Claim(tmp_path) as claim, Journal(claim, IDENTITY, lines(*NAMES)) as journal:
        journal.append(result("a"))
        assert journal.commit() == 1  # the first one at once
        journal.append(result("b"))
        assert journal.commit() == 0
        assert list(journal.finished()) == ["a"]
        assert journal.flush() == 1


@pytest.mark.parametrize("lost", ["cut off", "zeros"])
def test_a_power_cut_costs_only_what_was_not_synced(tmp_path: Path, lost: str) -> None:
    """Whatever the disk has of the bytes after the last sync: nothing, a part, or a length without content."""
    path = tmp_path / "journal"
    with Claim(tmp_path) as claim, Journal(claim, IDENTITY, lines(*NAMES)) as journal:
        journal.append(result("a"))
        journal.flush()
        synced = path.stat().st_size
        journal.append(result("b"))
        journal.append(result("c"))
        journal.flush()
    whole = path.read_bytes()
    for end in range(synced, len(whole) + 1):
        path.write_bytes(whole[:end] + (bytes(len(whole) - end) if lost == "zeros" else b""))
        assert done(tmp_path)[0] == "a"
        finish(tmp_path, *(name for name in NAMES if name not in done(tmp_path)))
        assert sorted(done(tmp_path)) == sorted(NAMES)


def test_the_end_of_a_run_is_noted(tmp_path: Path) -> None:
    assert finished(tmp_path / "nowhere") is None
    finish(tmp_path, *NAMES)
    assert finished(tmp_path) is None
    with Claim(tmp_path) as claim, Journal(claim, IDENTITY, lines(*NAMES)) as journal:
        journal.finish(errors=2)
    assert finished(tmp_path) == Finished(2)
    finish(tmp_path)  # started again, nothing to do
    assert finished(tmp_path) == Finished(2)
    finish(tmp_path, "f", of=(*NAMES, "f"))  # a line more
    assert finished(tmp_path) is None


def test_another_model_is_refused_by_its_file(tmp_path: Path) -> None:
    files = {
        "model/chat_template.jinja": {"bytes": 3, "hash": "ab", "modified": None},
        "model/model.gguf": {"bytes": 30, "hash": "cd", "modified": 17},
    }
    with Claim(tmp_path) as claim:
        Journal(claim, files, lines("a")).close()
    for changes, words in [
        (
            {"model/chat_template.jinja": {"bytes": 3, "hash": "xx", "modified": None}},
            "chat_template.jinja has changed; ",
        ),
        ({"model/generation_config.json": {"bytes": 3, "hash": "xx"}}, "generation_config.json is new; "),
        (
            {"model/model.gguf": {"bytes": 30, "hash": "cd", "modified": 18}},
            "model.gguf was modified since, though its size and samples of it are the same. If it is the same file, "
            "say so with touch -d @17 model.gguf; ",
        ),
    ]:
        with Claim(tmp_path) as claim, pytest.raises(OutputError) as caught:
            Journal(claim, files | changes, lines("a"))
        assert f"belongs to another job: the model's file {words}" in str(caught.value)
    del files["model/model.gguf"]
    with Claim(tmp_path) as claim, pytest.raises(OutputError, match=r"model\.gguf is gone; change it back"):
        Journal(claim, files, lines("a"))


def test_a_start_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    """Though it sees another model: what is not verified, and a header behind that, belong to the other job."""
    with Claim(tmp_path) as claim, Journal(claim, IDENTITY, lines(*NAMES), model_state="first") as journal:
        journal.append(result("a"))
        journal.flush()
    path = tmp_path / "journal"
    raw = bytearray(path.read_bytes())
    raw[50] ^= 1  # in the first header
    path.write_bytes(raw)
    for identity, named in ((IDENTITY | {"sampling.seed": 4}, NAMES), (IDENTITY, NAMES[1:])):
        with Claim(tmp_path) as claim, pytest.raises(OutputError):
            Journal(claim, identity, lines(*named), model_state="second")
        assert path.read_bytes() == raw
    with Claim(tmp_path) as claim, Journal(claim, IDENTITY, lines(*NAMES), model_state="first") as journal:
        assert list(journal.finished()) == ["a"]
    path.write_bytes(raw)
    with Claim(tmp_path) as claim, Journal(claim, IDENTITY, lines(*NAMES), model_state="second") as journal:
        assert list(journal.finished()) == []
    assert done(tmp_path) == []
