"""The data that a rank has in every state of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime
from functools import cached_property
from pathlib import Path

from mpillm.comm.world import World
from mpillm.engine.limits import Totals
from mpillm.planning.wire import with_wire
from mpillm.run.assistant import Assistant
from mpillm.run.computation import Computation
from mpillm.run.job import open_job
from mpillm.run.opened import model_of
from mpillm.run.origin import Origin
from mpillm.run.progress import Progress
from mpillm.run.session import Session
from mpillm.run.tracer import Tracer
from mpillm.spec import Spec
from mpillm.store.journal_facts import first_layout
from mpillm.store.output import JOURNAL, PATIENCE, Claim

TAKEOVER = 15.0  # seconds within which the lock of a lost rank 0 must be released


class RankContext:
    """The data that a rank has in every state, and the operations that several states share."""

    def __init__(
        self, world: World, spec: Spec, progress: Progress, stack: ExitStack, tracer: Tracer | None
    ) -> None:
        """`stack` closes at the end what must be closed."""
        self.world, self.spec, self.progress, self.stack = world, spec, progress, stack
        self.tracer = tracer
        self.start = time.monotonic()
        self.computes_since = 0.0  # time.monotonic() of the first session; 0 before it
        self.longest_step = 0.0  # seconds
        self._computation: Computation | None = None  # the latest one

    @cached_property
    def claim(self) -> Claim:
        """The claim on the output directory, made at the first access; rank 0 only."""
        patience = TAKEOVER if self.world.lost else PATIENCE
        return self.stack.enter_context(Claim(self.spec.output_path, patience))

    @property
    def resumes(self) -> bool:
        """Whether earlier starts have written a journal; rank 0 only."""
        return JOURNAL in self.claim.directory.names()

    def assistant(self, session: Session, path: Path, since: datetime) -> Assistant | None:
        """Return the assistant of a rank other than rank 0 if it leads a replica; the run began at the time `since`."""
        if session.place.rank:
            return None
        return Assistant(session, self.spec, model_of(session, path, lambda: since))

    def computation(self, session: Session, path: Path, before: Computation | None) -> Computation:
        """Open the job, or continue the computation `before` a loss; rank 0 only."""
        if self._computation is not before:  # a loss came before it began
            self._close_computation()
        if before is not None:
            computation = before.continued(session)
        else:
            job, journal = open_job(session, self.spec, path, self.claim, self.progress)
            computation = Computation(job, session, journal, Totals())
            job.phases.end("prepare")
            self.stack.callback(self._close_computation)
        self._computation = computation
        return computation

    def _close_computation(self) -> None:
        if self._computation is not None:
            self._computation.close()

    def kept(self, origin: Origin | None) -> tuple[Spec, int | None]:
        """Return the job with the run's original wire between shards, and their number if results depend on it.

        Collective.
        """
        spec = self.spec
        if spec.wire.activations == "f32":
            return spec, None
        first = origin.layout if origin else self.world.on_rank_0(lambda: first_layout(self.claim))
        if first is None:
            return spec, None
        if spec.wire.activations == "auto":
            spec = with_wire(spec, first.wire)
        return spec, first.shards if spec.wire.activations != "f32" else None

    @contextmanager
    def computing(self, session: Session) -> Iterator[None]:
        """Compute with the session in the block, and close it at the end."""
        with closing(session), self.world.computing():
            try:
                yield
            finally:
                self.longest_step = session.worker.longest
