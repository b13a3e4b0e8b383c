"""Facts read from a journal without continuing it: when its run began, on which layout, and how it ended."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import msgspec

from mpillm.store.directory import Directory, explained
from mpillm.store.output import JOURNAL, Claim
from mpillm.store.records import Finished, JournalHeader, UsedLayout, good_records, scan, tag_of


@contextlib.contextmanager
def _opened(directory: Directory) -> Iterator[int | None]:
    """The journal of the directory, opened for reading; None if there is none yet."""
    with explained(directory.path / JOURNAL, reads=True):
        try:
            file = directory.open(JOURNAL, os.O_RDONLY)
        except FileNotFoundError:
            yield None
            return
        try:
            yield file
        finally:
            os.close(file)


def began(claim: Claim) -> datetime:
    """Return the time when the run in the claimed directory first began: now, if it has no readable journal yet.

    A chat template that asks for the date gets this one, so that a run that is resumed tomorrow gives the same bytes.
    """
    with _opened(claim.directory) as file:
        for _, payload in good_records(file) if file is not None else ():
            if tag_of(payload) == "header":
                return datetime.fromisoformat(msgspec.msgpack.decode(payload, type=JournalHeader).began)
    return claim.since


def first_layout(claim: Claim) -> UsedLayout | None:
    """Return the layout on which the run in the claimed directory has answered its first requests."""
    with _opened(claim.directory) as file:
        for _, payload in good_records(file) if file is not None else ():
            if (tag := tag_of(payload)) == "layout":
                return msgspec.msgpack.decode(payload, type=UsedLayout)
            if tag in ("result", "part"):
                break
    return None


def finished(path: Path) -> Finished | None:
    """Return the end of the run in this directory; None if it is not finished, or if its input has grown since."""
    with explained(path, reads=True):
        try:
            directory = Directory(path)
        except FileNotFoundError:
            return None
    with directory, _opened(directory) as file:
        return scan(file).finished if file is not None else None
