"""Speeds that a run has measured, kept in its output directory: a run that goes on there on the same hosts uses them.

The file is not of the journal: without it, or if it cannot be read, hosts are measured anew.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import msgspec

from mpillm.planning.speed import Speed
from mpillm.store.directory import Directory, explained
from mpillm.store.output import SPEEDS


class _Noted(msgspec.Struct, frozen=True):
    places: Sequence[str]  # where each rank was, and with what
    effort: float
    speeds: Sequence[Speed]


class SpeedNotes:
    """The file in the output directory, on rank 0."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def find(self, places: Sequence[str], effort: float) -> Sequence[Speed] | None:
        """The speeds of ranks at these places, if they were measured with such an effort or a greater one."""
        with contextlib.suppress(OSError, msgspec.DecodeError):
            descriptor = self._directory.open(SPEEDS, os.O_RDONLY)
            with open(descriptor, "rb") as file:
                noted = msgspec.json.decode(file.read(), type=_Noted)
            if list(noted.places) == list(places) and noted.effort >= effort:
                return noted.speeds
        return None

    def keep(self, places: Sequence[str], effort: float, speeds: Sequence[Speed]) -> None:
        """Note what was measured; OutputError if that is impossible."""
        with (
            explained(self._directory.path / SPEEDS),
            self._directory.replacing(SPEEDS) as file,
        ):
            file.write(msgspec.json.encode(_Noted(places, effort, speeds)))
