"""Whether a journal is of the same job: the same settings, the same model, and all lines that it had before.

The functions raise OutputError, which says what differs and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpillm.batch.work import Line
from mpillm.errors import OutputError
from mpillm.store.records import KEY_BYTES, VERSION, JournalHeader, Name

MODEL_FILE = "model/"  # begins the keys of an identity that are files of the model


def refuse_other_job(journal: Path, was: JournalHeader, now: JournalHeader) -> None:
    """Raise OutputError if the header `was` of a journal belongs to another job than `now`, or has another format."""
    if was.version != VERSION:
        raise OutputError(
            f"The journal {journal} is of format {was.version} (mpillm {was.written_by}) and this mpillm knows "
            f"format {VERSION}; give another output."
        )
    missing = object()
    for key in {**was.identity, **now.identity}:
        before, after = was.identity.get(key, missing), now.identity.get(key, missing)
        if before != after:
            if key.startswith(MODEL_FILE):
                raise OutputError(_other_model(journal, key.removeprefix(MODEL_FILE), before, after))
            told = [("unset" if value is missing else repr(value)) for value in (before, after)]
            raise OutputError(
                f"The output directory {journal.parent} belongs to another job: {key} was {told[0]} and is "
                f"{told[1]}; change it back or give another output."
            )


def _other_model(journal: Path, name: str, before: object, after: object) -> str:
    said = f"The output directory {journal.parent} belongs to another job: the model's file {name} "
    if not isinstance(before, dict) or not isinstance(after, dict):
        return (
            f"{said}is {'new' if isinstance(after, dict) else 'gone'}; change it back or give another output."
        )
    if before["hash"] != after["hash"] or before["bytes"] != after["bytes"]:
        return f"{said}has changed; change it back or give another output."
    return (
        f"{said}was modified since, though its size and samples of it are the same. If it is the same file, say so "
        f"with touch -d @{before['modified']} {name}; else give another output."
    )


def refuse_changed_lines(
    journal: Path, old: bytes, keys: bytes, lines: Iterable[Line], done: Iterable[Name]
) -> None:
    """Raise OutputError if a line has changed or is missing; lines may be added anywhere.

    `old` are the keys of the lines that the journal had, `keys` those of `lines` now; `done` are finished requests.
    """
    now, what = np.sort(_as_numbers(keys)), "the input has changed since the run began"
    for name in done:
        if len(name.key) != KEY_BYTES or not _are_in(now, _as_numbers(name.key)).all():
            raise OutputError(
                _changed(
                    journal,
                    f"{what}: the line of {name.custom_id!r}, which is finished, was changed or removed",
                )
            )
    for index in np.flatnonzero(~_are_in(now, _as_numbers(old))).tolist():
        line = next(islice(lines, index, None), None)
        called = "" if line is None else f" (now {line.custom_id!r})"
        raise OutputError(
            _changed(journal, f"{what}: its request {index + 1}{called} was changed or removed")
        )


def _changed(journal: Path, what: str) -> str:
    begin = f"The output directory {journal.parent} belongs to another job"
    return f"{begin}: {what}; restore it or give another output."


def _as_numbers(keys: bytes) -> NDArray[np.uint64]:
    """Keys of lines, as numbers."""
    return np.frombuffer(keys, "<u8", len(keys) // KEY_BYTES)


def _are_in(numbers: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return whether each of the wanted numbers is among sorted numbers, which are not empty."""
    found: NDArray[np.bool_] = numbers[np.searchsorted(numbers, wanted).clip(max=len(numbers) - 1)] == wanted
    return found
