"""The journal: on disk before it counts, whole or not at all, and of one job only."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillm.batch.work import Line
from mpillm.engine.request import PartialCompletion
from mpillm.errors import Interrupted, OutputError
from mpillm.store.journal import Journal
from mpillm.store.journal_facts import began, finished
from mpillm.store.output import Claim
from mpillm.store.records import HEAD, Finished, PartialResult, Result, framed, line_key
from tests.conftest import Mount
from tests.job_helpers import lines, result

IDENTITY = {"model": "abc", "sampling.seed": 3, "sampling.stop": ["a"], "sampling.temperature": 0.1}
NAMES = ("a", "b", "c", "d", "e")


def finish(folder: Path, *names: str, of: tuple[str, ...] = NAMES) -> None:
    """Run until these requests are finished."""
    with Claim(folder) as claim, Journal(claim, IDENTITY, lines(*of)) as journal:
        for name in names:
            journal.append(result(name))
        journal.flush()


def done(folder: Path, of: tuple[str, ...] = NAMES) -> list[str]:
    with Claim(folder) as claim, Journal(claim, IDENTITY, lines(*of)) as journal:
        for name in journal.finished():
            assert journal.read(name) == result(name)
        return list(journal.finished())


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
        (("a", "b", "c", "d", "e"), r"its request 1 \(now 'a'\) is changed or gone; restore it or"),
        (
            ("new", "b", "c", "d", "e", "newer"),
            "the line of 'a', which is done, is changed or gone; restore it",
        ),
        (("new", "a", "b", "c", "newer"), r"its request 5 \(now 'newer'\) is changed or gone"),
        (("new", "a", "b", "c"), "its request 5 is changed or gone"),
    ]:
        with pytest.raises(OutputError, match=words):
            done(tmp_path, of=of)
    changed = [
        Line(1, 0, 0, name, (name if name != "a" else "other").encode()) for name in ("new", *NAMES, "newer")
    ]
    with (
        Claim(tmp_path) as claim,
        pytest.raises(OutputError, match="the line of 'a', which is done, is changed"),
    ):
        Journal(claim, IDENTITY, changed)


def test_a_torn_end_is_dropped_at_every_byte(tmp_path: Path) -> None:
    finish(tmp_path, "a", "b")
    path = tmp_path / "journal"
    whole = path.read_bytes()
    finish(tmp_path, "c")
    longer = path.read_bytes()
    for cut in range(len(whole), len(longer)):
        path.write_bytes(longer[:cut])
        assert done(tmp_path) == ["a", "b"]
        assert path.read_bytes() == whole
    path.write_bytes(whole + bytes(5000))  # a file system that had grown the file before it wrote
    assert done(tmp_path) == ["a", "b"]
    assert path.read_bytes() == whole


@settings(max_examples=40)
@given(st.data())
def test_flipped_bits_are_named_and_cost_their_own_record(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        ends = []
        with Claim(out) as claim, Journal(claim, IDENTITY, lines(*NAMES)) as journal:
            start = journal.path.stat().st_size
            for name in NAMES:
                journal.append(result(name))
                journal.flush()
                ends.append(journal.path.stat().st_size)
        raw = bytearray((out / "journal").read_bytes())
        byte = data.draw(st.integers(start, len(raw) - 1))
        raw[byte] ^= 1 << data.draw(st.integers(0, 7))
        (out / "journal").write_bytes(raw)
        hit = next(index for index, end in enumerate(ends) if byte < end)
        with Claim(out) as claim, Journal(claim, IDENTITY, lines(*NAMES)) as journal:
            assert list(journal.finished()) == [name for index, name in enumerate(NAMES) if index != hit]
            if hit < len(NAMES) - 1:  # the last one cannot be told from a torn one
                first = ends[hit - 1] if hit else start
                assert journal.damage == [
                    f"The journal {out / 'journal'} is damaged in bytes {first} to {ends[hit]}; "
                    "the requests in it run again."
                ]
            journal.append(result(NAMES[hit]))
            journal.flush()
        assert sorted(done(out)) == list(NAMES)


@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_behind_good_records_do_no_harm(junk: bytes, then_more: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        finish(out, "a", "b")
        with (out / "journal").open("ab") as file:
            file.write(junk)
        if then_more:
            finish(out, "c")
        assert done(out) == ["a", "b", "c"][: 2 + then_more]


def test_a_record_in_a_wrong_place_is_none(tmp_path: Path) -> None:
    finish(tmp_path)
    start = (tmp_path / "journal").stat().st_size
    finish(tmp_path, "a")
    record = (tmp_path / "journal").read_bytes()[start:]
    with (tmp_path / "journal").open("ab") as file:
        file.write(record.replace(b"x", b"x") * 2)
    assert done(tmp_path) == ["a"]
    with Claim(tmp_path) as claim, Journal(claim, IDENTITY, lines(*NAMES)) as journal:
        journal.append(result("b", payload=record))  # a record inside a record
        journal.flush()
    with Claim(tmp_path) as claim, Journal(claim, IDENTITY, lines(*NAMES)) as journal:
        assert list(journal.finished()) == ["a", "b"]
        assert journal.read("b").line == record


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_header_costs_nothing(tmp_path: Path, seed: int) -> None:
    """Any flipped bit of the first record; afterwards there are two good copies again."""
    finish(tmp_path, "a", "b")
    path = tmp_path / "journal"
    raw = path.read_bytes()
    first = HEAD.size + HEAD.unpack_from(raw)[1]
    with Claim(tmp_path) as claim:
        since = began(claim)
    for byte in range(seed, first, 4):
        damaged = bytearray(raw)
        damaged[byte] ^= 1 << (byte % 8)
        path.write_bytes(damaged)
        with Claim(tmp_path) as claim:
            assert began(claim) == since
            with Journal(claim, IDENTITY, lines(*NAMES)) as journal:
                assert list(journal.finished()) == ["a", "b"]
                assert journal.damage == [
                    f"The journal {path} is damaged in bytes 0 to {first}; the requests in it run again."
                ]
            with pytest.raises(OutputError, match=r"sampling\.seed was 3 and is 4"):
                Journal(claim, IDENTITY | {"sampling.seed": 4}, lines(*NAMES))
    healed = bytearray(path.read_bytes())
    second = first + HEAD.size + HEAD.unpack_from(raw, first)[1]
    healed[second + 40] ^= 1
    path.write_bytes(healed)
    assert done(tmp_path) == ["a", "b"]


def test_a_journal_without_any_header_and_a_newer_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(tmp_path, "a")
    path = tmp_path / "journal"
    raw = path.read_bytes()
    path.write_bytes(bytes(len(raw)))
    with pytest.raises(
        OutputError, match=r"nothing in it says which job it is of; move it away, or give another output"
    ):
        done(tmp_path)
    path.write_bytes(raw)
    monkeypatch.setattr("mpillm.store.same_job.VERSION", 3)
    with pytest.raises(
        OutputError, match=r"is of format 2 \(mpillm \S+\) and this mpillm knows format 3; give"
    ):
        done(tmp_path)


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_journal_that_is_gone_is_noticed(tmp_path: Path, how: str) -> None:
    with Claim(tmp_path) as claim, Journal(claim, IDENTITY, lines(*NAMES)) as journal:
        journal.check()
        journal.path.rename(tmp_path / "away")
        if how == "replaced":
            journal.path.write_bytes((tmp_path / "away").read_bytes())
        with pytest.raises(Interrupted, match="was deleted or replaced during the run; put it back"):
            journal.check()


def test_bit_rot_during_the_run_is_named(tmp_path: Path) -> None:
    with Claim(tmp_path) as claim, Journal(claim, IDENTITY, lines(*NAMES)) as journal:
        journal.append(result("a"))
        journal.flush()
        raw = bytearray(journal.path.read_bytes())
        raw[-1] ^= 1
        journal.path.write_bytes(raw)
        with pytest.raises(
            Interrupted, match=r"damaged at byte \d+ \(custom_id 'a'\); run the same command again"
        ):
            journal.read("a")


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
        assert str(said).endswith("what was finished is safe: make space and run the same command again.")
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


def part(name: str, start: int, *tokens: int, choice: int = 0) -> PartialResult:
    """A stretch of a choice; a token's values are made of it."""
    begun = PartialCompletion(
        tokens=list(tokens),
        logprobs=[-token / 3 for token in tokens],
        top=[[(token, -token / 7), (token + 1, float("-inf"))] for token in tokens],
        prompt_logprobs=[] if start else [-0.1, -0.2],
        prompt_top=[] if start else [[(5, -0.1)], [(6, -1e-300)]],
        seconds_waiting=0.5,
        seconds_running=start + 1.5,
    )
    return PartialResult(name, line_key(lines(name)[0]), choice, start, begun)


def begun(folder: Path, name: str, of: tuple[str, ...] = NAMES) -> dict[int, PartialCompletion]:
    with Claim(folder) as claim, Journal(claim, IDENTITY, lines(*of)) as journal:
        found = journal.partial(next(line for line in lines(*of) if line.custom_id == name))
        assert journal.partial(lines(name)[0]) == {}  # given once
        return found


def append(folder: Path, *records: PartialResult | Result) -> None:
    with Claim(folder) as claim, Journal(claim, IDENTITY, lines(*NAMES)) as journal:
        for record in records:
            journal.append(record)
        assert journal.flush() == sum(isinstance(record, Result) for record in records)


def test_parts_of_a_long_answer_are_put_together_again(tmp_path: Path) -> None:
    append(tmp_path, part("a", 0, 1, 2, 3), part("b", 0, 7), part("a", 0, 9, choice=1))
    append(tmp_path, part("a", 3, 4, 5), result("c"))
    assert done(tmp_path) == ["c"]
    assert begun(tmp_path, "c") == begun(tmp_path, "d") == {}
    whole = replace(part("a", 0, 1, 2, 3, 4, 5).completion, seconds_running=4.5)
    assert begun(tmp_path, "a") == {0: whole, 1: part("a", 0, 9).completion}
    # From an earlier token again (a later part was lost), or from the start (a choice that has come to its end).
    append(tmp_path, part("a", 4, 6), part("b", 0, 7, 8))
    assert begun(tmp_path, "a")[0].tokens == [1, 2, 3, 4, 6]
    assert begun(tmp_path, "b") == {0: part("b", 0, 7, 8).completion}
    append(tmp_path, result("a"))
    assert begun(tmp_path, "a") == {}


def test_a_damaged_part_costs_what_comes_after_it(tmp_path: Path) -> None:
    ends = []
    for record in (part("a", 0, 1, 2), part("a", 2, 3), part("a", 3, 4)):
        append(tmp_path, record)
        ends.append((tmp_path / "journal").stat().st_size)
    raw = (tmp_path / "journal").read_bytes()
    for hit, left in ((ends[0] - 1, {}), (ends[1] - 1, {0: [1, 2]}), (ends[2] - 1, {0: [1, 2, 3]})):
        (tmp_path / "journal").write_bytes(raw[:hit] + bytes([raw[hit] ^ 4]) + raw[hit + 1 :])
        assert {choice: found.tokens for choice, found in begun(tmp_path, "a").items()} == left


def test_a_part_of_a_line_that_has_changed_is_left(tmp_path: Path) -> None:
    append(tmp_path, part("a", 0, 1))
    with Claim(tmp_path) as claim, Journal(claim, IDENTITY, lines(*NAMES)) as journal:
        assert journal.partial(Line(1, 0, 0, "a", b"other words")) == {}


def test_records_of_other_kinds_are_passed_over(tmp_path: Path) -> None:
    class Novelty(msgspec.Struct, tag="novelty"):
        what: str

    finish(tmp_path, "a")
    with (tmp_path / "journal").open("ab") as file:
        file.write(framed(Novelty("?"), file.tell()))  # type: ignore[arg-type]
    assert done(tmp_path) == ["a"]


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


def test_what_may_be_of_a_changed_model_is_dropped(tmp_path: Path) -> None:
    """Counted is what was there at the look before the last good one, for ranks do not look at the same moment."""

    def opened(claim: Claim, state: str) -> Journal:
        return Journal(claim, IDENTITY, lines(*NAMES), model_state=state)

    with Claim(tmp_path) as claim, opened(claim, "first") as journal:
        for name in NAMES[:4]:
            journal.append(result(name))
            journal.flush()
            if name != "d":
                journal.mark_verified()
        journal.flush()
    with Claim(tmp_path) as claim, opened(claim, "first") as journal:  # nobody has touched the files
        assert list(journal.finished()) == ["a", "b", "c", "d"]
    with Claim(tmp_path) as claim, opened(claim, "second") as journal:
        assert list(journal.finished()) == ["a", "b"]
        assert journal.damage == [
            f"The model's files were touched, or are other copies, since the journal {tmp_path / 'journal'} was "
            "written: the last 2 request(s) run again."
        ]
        journal.append(result("c"))
        journal.flush()
        journal.mark_verified(all_ranks=True)
        journal.append(result("d"))
        journal.flush()
        journal.append(result("e"))
        journal.drop_unverified()
        assert journal.flush() == 0
        assert list(journal.finished()) == ["a", "b", "c"]
    with Claim(tmp_path) as claim, opened(claim, "third") as journal:
        assert list(journal.finished()) == ["a", "b", "c"]
        assert journal.damage == []


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
