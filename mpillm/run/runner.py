"""Runs a job from its file to its results: every rank advances through the states of `run.states`."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from pathlib import Path

from mpillm.comm.faults import RankLost
from mpillm.comm.world import World
from mpillm.run.context import RankContext
from mpillm.run.losses import Loss
from mpillm.run.progress import Progress
from mpillm.run.states import Ended, Regrouping, Starting, State
from mpillm.run.tracer import Tracer
from mpillm.spec import Spec
from mpillm.store.report import Report

log = logging.getLogger(__name__)


def run(world: World, spec: Spec, progress: Progress, trace: Path | None = None) -> Report | None:
    """Run a job on all ranks (collective); return the report on rank 0, None on the others. Raises MpillmError.

    The run writes a trace to the file `trace`, if given; one that is interrupted, that of rank 0.
    """
    with ExitStack() as stack:
        tracer = stack.enter_context(Tracer.started(world, trace)) if trace else None
        rank = RankContext(world, spec, progress, stack, tracer)
        state: State | Regrouping | Ended = Starting()
        while True:
            try:
                with world.losses():
                    while not isinstance(state, Ended):
                        state = state.advance(rank)
                    return state.report
            except RankLost:
                noticed = time.monotonic()
            # Outside the except block, in which the error still refers to the memory of the state.
            lost = world.shrink(3 * rank.longest_step)
            log.info("%s lost %s; agreed after %.3f s", world, ", ".join(lost), time.monotonic() - noticed)
            loss = Loss(tuple(lost), noticed)
            assert not isinstance(state, Ended)
            if isinstance(state, Regrouping):
                state = Regrouping(state.before, (*state.losses, loss))
            else:
                state = Regrouping(state, (loss,))
