"""Partial results in the journal: what was generated of an answer before a run stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from mpillm.batch.work import Line
from mpillm.store.journal import Journal
from mpillm.store.output import Claim
from mpillm.store.records import framed
from tests.job_helpers import lines, result
from tests.store.journals import IDENTITY, NAMES, append, begun, done, finish, part


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


@pytest.mark.parametrize(
    ("state", "kept"),
    [("a+b+c", True), ("a+b", True), ("b", True), ("a+b+c+d", True), ("a+b+d", False), ("d", False)],
)
def test_nothing_is_dropped_when_hosts_leave_or_join(tmp_path: Path, state: str, kept: bool) -> None:
    """Each host may have its own copy of the model; one that is replaced together with its host counts as changed."""
    with Claim(tmp_path) as claim, Journal(claim, IDENTITY, lines(*NAMES), model_state="a+b+c") as journal:
        journal.append(result("a"))
        journal.flush()
    with Claim(tmp_path) as claim, Journal(claim, IDENTITY, lines(*NAMES), model_state=state) as journal:
        assert (list(journal.finished()) == ["a"]) is kept


@pytest.mark.parametrize(
    ("state", "watched", "kept"),
    [("a+b", False, True), ("b", False, True), ("b+c", False, False), ("b+c", True, True)],
)
def test_hosts_join_while_the_journal_is_open(tmp_path: Path, state: str, watched: bool, kept: bool) -> None:
    """Their results follow the note of their files; ranks that go on, and have watched theirs, lose none."""
    with Claim(tmp_path) as claim, Journal(claim, IDENTITY, lines(*NAMES), model_state="a") as journal:
        journal.join(["b"])
        journal.append(result("a"))
        journal.flush()
    opened = Claim(tmp_path)
    with opened as claim, Journal(claim, IDENTITY, lines(*NAMES), None, state, watched) as journal:
        assert (list(journal.finished()) == ["a"]) is kept


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
            f"The model's files were modified, replaced or moved to other hosts since the journal "
            f"{tmp_path / 'journal'} was written: the last 2 requests will run again."
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
