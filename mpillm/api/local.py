"""The caller's own ranks: a program that mpiexec has started, in which every rank makes the same calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter

from mpillm.comm.world import World
from mpillm.errors import JobError
from mpillm.run.service import Service
from mpillm.spec import Spec, known_keys
from mpillm.store.records import Result


class Local:
    """A model laid out over the ranks of a world. Everything here is collective."""

    def __init__(self, world: World, spec: Spec) -> None:
        self._world = world
        _check_settings(world, spec)
        self._service = Service(world, spec)
        self.open = True
        self.model, self.layout = world.bcast((self._service.name, str(self._service.layout)))

    def ask(self, lines: Sequence[bytes]) -> Iterator[tuple[int, Result]]:
        """Yield each result when it is finished, on rank 0, whose lines count; the others get all of them at the end.

        The generator may be closed before its end, if all ranks do so.
        """
        if self._world.rank:
            self._service.follow()
            yield from self._world.bcast([])
            return
        received: list[tuple[int, Result]] = []
        steps = self._service.answers(lines)
        try:
            for results in steps:
                received += results
                yield from results
        except GeneratorExit:
            steps.close()
            self._world.bcast(received)
            raise
        self._world.bcast(received)

    def close(self) -> None:
        """Let go of the model; MPI is the caller's."""
        if self.open:
            self.open = False
            self._service.close()


def _check_settings(world: World, spec: Spec) -> None:
    """Raise JobError unless all ranks have the same settings; the model may have another path on each host."""
    first, *others = world.gather(spec)
    for rank, other in enumerate(others, 1):
        for key in known_keys():
            own, value = attrgetter(key)(first), attrgetter(key)(other)
            if key != "model" and own != value:
                raise JobError(
                    f"{key} is {value!r} on rank {rank} (host {world.hosts[rank]}) and {own!r} on rank 0; give LLM the "
                    "same settings on every rank."
                )
