"""The trace of a run: rank 0 gathers the spans of all ranks at the end and writes them to one file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mpillm import tracing
from mpillm.comm.world import World
from mpillm.errors import JobError, MpillmError
from mpillm.store import trace_file
from mpillm.store.trace_file import RankTrace

SPANS = 200_000  # spans that all ranks together keep, at most: about 60 MB on rank 0


class Tracer:
    """Records the spans of this rank."""

    def __init__(self, path: Path, world: World) -> None:
        self._path, self._world = path, world
        self._recorder = tracing.start(SPANS // world.size)
        self._ranks: list[RankTrace] = []

    @classmethod
    @contextmanager
    def started(cls, world: World, path: Path) -> Iterator[Tracer]:
        """Record in the block (collective); raises JobError if the file could not be written at the end.

        If the block ends with an error, such as Interrupted, rank 0 writes what it has: the others may have ended.
        """
        with world.together():
            unsuited = path.exists() and not path.is_file()
            if world.rank == 0 and (unsuited or not os.access(path.absolute().parent, os.W_OK)):
                raise JobError(
                    f"--trace {path} cannot be written: give a file in a directory that exists and can be written."
                )
        try:
            yield (tracer := cls(path, world))
        except MpillmError:
            if world.rank == 0:
                with suppress(MpillmError):
                    tracer.write()
            raise
        finally:
            tracing.stop()

    def gather(self) -> None:
        """Gather the spans of all ranks on rank 0, one rank after the other (collective)."""
        world, own = self._world, self._own()
        for rank in range(1, world.size):
            found = world.gather(own if world.rank == rank else None)[rank]
            if world.rank == 0 and found is not None:
                self._ranks.append(found)

    def write(self) -> None:
        """On rank 0, write the file, including rank 0's spans since `gather`."""
        trace_file.write(self._path, [self._own(), *self._ranks])

    def _own(self) -> RankTrace:
        recorder = self._recorder
        return RankTrace(
            self._world.rank, self._world.host, recorder.ahead, recorder.sums, list(recorder.spans)
        )
