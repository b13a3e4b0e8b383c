"""A model that stays in memory between batches of requests, for the Python API.

Nothing is stored on disk. The answers equal those of a run whose input has the same lines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from datetime import datetime

from mpillm.batch import bodies
from mpillm.batch.answers import error_line
from mpillm.batch.order import ordered
from mpillm.batch.pending import Pending
from mpillm.batch.requests import make_work
from mpillm.batch.rows.line import MAX_LINE
from mpillm.batch.work import Line, Work
from mpillm.comm.world import World
from mpillm.engine.request import FinishedCompletion, Request
from mpillm.engine.worker import follow
from mpillm.errors import ModelError, RequestError
from mpillm.run.opened import found_here, model_of, model_path
from mpillm.run.progress import Bar
from mpillm.run.session import Session
from mpillm.spec import Spec
from mpillm.store import results
from mpillm.store.records import Result, UsedLayout


class _Quiet:
    """A `Progress` that shows nothing."""

    def say(self, line: str) -> None:
        pass

    def downloading(self, done: int, total: int) -> None:
        pass

    def requests(self, total: int, done: int, tokens: int, since: float) -> AbstractContextManager[Bar]:
        raise NotImplementedError


class Service:
    """A model on all ranks. The constructor is collective; then rank 0 calls `answers`, and the others `follow`."""

    def __init__(self, world: World, spec: Spec, leave_out: bool = False) -> None:
        """Load the model of `spec`, ignoring input and output; raises MpillmError on all ranks if one fails.

        `leave_out` is that of `Session`; a spare rank (`World.spare`) then has nothing but `close`.
        """
        quiet = _Quiet()
        path = model_path(world, spec, quiet)
        find = found_here(world, spec, quiet)
        self._session = session = Session(world, spec, path, leave_out=leave_out, find=find)
        self._spec = spec
        self.name = ""
        if world.spare:
            return
        with world.together():
            if world.rank == 0:
                since = datetime.now().astimezone()
                self.model = model_of(session, path, lambda: since)
                self.name = self.model.name
                self._engine = session.engine()

    @property
    def layout(self) -> UsedLayout:
        """The stages and shards."""
        return self._session.layout

    def follow(self) -> None:
        """On every rank but 0: take part in one call of `answers`."""
        if follow(self._session.worker, self._session.channel, self._session.watch.check):
            raise ModelError("Rank 0 has stopped.")

    def answers(self, lines: Sequence[bytes]) -> Generator[list[tuple[int, Result]], None, None]:
        """On rank 0: compute lines of the batch format; yield after every step the indices and results it finished.

        A wrong line has an error as its result. The generator may be closed before its end.
        """
        pending: dict[str, tuple[int, Pending]] = {}
        refused: list[tuple[int, Result]] = []
        code = 1
        try:
            with closing(self._engine.run(self._requests(lines, pending, refused))) as steps:
                for completions in steps:
                    finished = [self._take(completion, pending) for completion in completions]
                    yield [*refused, *filter(None, finished)]
                    refused.clear()
                    self._session.watch.check()
            code = 0
            yield refused
        except GeneratorExit:
            code = 0
            raise
        finally:
            self._engine.stop(code)

    def _requests(
        self,
        lines: Sequence[bytes],
        pending: dict[str, tuple[int, Pending]],
        refused: list[tuple[int, Result]],
    ) -> Iterator[Request]:
        for work in ordered(self._works(lines, pending, refused), self.model.cached_tokens):
            yield from work.requests

    def _works(
        self,
        lines: Sequence[bytes],
        pending: dict[str, tuple[int, Pending]],
        refused: list[tuple[int, Result]],
    ) -> Iterator[Work]:
        names: set[str] = set()
        for index, raw in enumerate(lines):
            name = f"request-{index + 1}"
            try:
                if len(raw) > MAX_LINE:
                    raise RequestError(f"the request is longer than {MAX_LINE >> 20} MiB")
                content = bodies.decode_line(raw)
                name = bodies.custom_id_of(content) or name
                if name in names:
                    raise RequestError(
                        f"the custom_id {name[:100]!r} is already that of another request", "custom_id"
                    )
                names.add(name)
                line = Line(index + 1, 0, len(raw), name, hashlib.blake2b(raw, digest_size=16).digest())
                work = make_work(line, content, self._spec, self.model)
            except RequestError as problem:
                message = f"Request {index + 1}: {str(problem).rstrip('.')}."
                refused.append(
                    (index, Result(name, b"", 400, error_line(name, message, param=problem.param)))
                )
                continue
            pending[name] = index, Pending(work)
            yield work

    def _take(
        self, completion: FinishedCompletion, pending: dict[str, tuple[int, Pending]]
    ) -> tuple[int, Result] | None:
        """Keep a completion; return the result of its line if it was the last one."""
        index, found = pending[completion.request.id]
        completions = found.take(completion)
        if completions is None:
            return None
        del pending[completion.request.id]
        return index, results.ended(found.work, completions, self.model)

    def close(self) -> None:
        """Release the model (on every rank)."""
        self._session.close()
