"""A damaged journal: torn ends, flipped bits, headers that are gone, other bytes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillm.errors import Interrupted, OutputError
from mpillm.store.journal import Journal
from mpillm.store.journal_facts import began
from mpillm.store.output import Claim
from mpillm.store.records import HEAD
from tests.job_helpers import lines, result
from tests.store.journals import IDENTITY, NAMES, done, finish


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
        OutputError,
        match=r"it does not say which job it belongs to; to start over, move it",
    ):
        done(tmp_path)
    path.write_bytes(raw)
    monkeypatch.setattr("mpillm.store.same_job.VERSION", 3)
    with pytest.raises(
        OutputError, match=r"is of format 2 \(mpillm \S+\) and this mpillm knows format 3; give"
    ):
        done(tmp_path)


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
