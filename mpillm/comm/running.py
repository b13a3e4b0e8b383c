"""Run a program on all ranks: report its errors, and let the ranks leave together with one exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from mpillm.comm import versions
from mpillm.comm.departure import Departure
from mpillm.comm.faults import RankLost
from mpillm.comm.launch import STOPS, SUPERVISED, to_continue
from mpillm.comm.world import World, say
from mpillm.errors import Interrupted, MpillmError, of_system

log = logging.getLogger(__name__)

CRASHED = 70  # exit code after an unforeseen error (EX_SOFTWARE of sysexits.h)
# Seconds in which the other ranks must finish or fail too, before the error of one rank aborts all.
GRACE = 2.0


def run(world: World, program: Callable[[World], int]) -> int:
    """Run the program on this rank and end MPI; return the exit code that all ranks share.

    An MpillmError that all ranks raise is reported once; one that the other ranks do not raise ends them after GRACE.
    Any other error is a bug: its last line is reported, and all ranks are aborted at once.
    """
    code, error = 0, None
    with _interruptible():
        try:
            world.start_heartbeat()
            versions.check(world)
            with world.together():  # a rank's environment may be wrong
                threads = world.threads()
            world.limit_threads(threads)
            code = program(world)
        except MpillmError as found:
            error = found
        except SystemExit as found:
            code = found.code if isinstance(found.code, int) else int(found.code is not None)
        except BaseException as bug:
            if world.is_loss(bug):
                world.abort(f"A rank was lost{to_continue(os.environ)}.", Interrupted.exit_code)
            log.debug("%s", "".join(traceback.format_exception(bug)))
            if (error := _interruption(bug) or of_system(bug)) is None:
                world.abort(_in_a_line(bug), CRASHED)
        return _leave(world, code, error)


def run_alone(program: Callable[[], int]) -> int:
    """Run a program that needs neither MPI nor other ranks; return its exit code, after saying what went wrong."""
    with _interruptible():
        try:
            return program()
        except MpillmError as error:
            say(f"mpillm: {error}")
            return error.exit_code
        except Exception as bug:
            return say_what_failed(bug)


def say_what_failed(bug: Exception, where: str = "") -> int:
    """Say what a system error or a bug was, with `where` after it; return the exit code for it."""
    log.debug("%s", "".join(traceback.format_exception(bug)))
    told = _interruption(bug) or of_system(bug)
    say(f"mpillm: {told or _in_a_line(bug)}{where}")
    return CRASHED if told is None else told.exit_code


def _leave(world: World, code: int, error: MpillmError | None) -> int:
    try:
        with world.losses():
            departure = world.depart(error.exit_code if error else code, error is not None)
            try:
                arrived = _all_arrive(world, departure, error)
            except Interrupted as signalled:
                error = error or signalled
                arrived = _all_arrive(world, departure, error)
            world.check_losses()  # a spare rank may have been lost after it had told that it leaves
    except RankLost:  # does not matter any more: this rank has done its work, or has failed
        if error:
            _report(world, error)
        world.exit(error.exit_code if error else code)
    if error and not arrived:
        world.abort(str(error), error.exit_code)
    failed = departure.failed
    if error and departure.rank in failed[:1]:
        _report(world, error)
    final = departure.code
    if world.lost:
        world.exit(final)  # MPI_Finalize may wait for the dead
    if world.size > 1:  # srun ends the other ranks when one has ended with an error, and their codes count
        _ignore_signals()
    world.end(final, orderly=not failed)
    return final


def _report(world: World, error: MpillmError) -> None:
    if text := str(error):
        say(f"{world} {text}" if world.rank else f"mpillm: {text}")


def _all_arrive(world: World, departure: Departure, error: MpillmError | None) -> bool:
    """Wait for the other ranks to leave as well; after an error, no longer than GRACE."""
    until = time.monotonic() + GRACE if error else float("inf")
    world.wait(lambda: departure.arrived() or time.monotonic() > until)
    return departure.arrived()


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) raise Interrupted once; launchers tend to send several signals.

    A supervisor's Interrupted has no text. Signals that are ignored at the end stay so: one more would kill the process
    on its way out, and change its exit code.
    """

    def interrupt(number: int, _frame: FrameType | None) -> NoReturn:
        _ignore_signals()
        sys.unraisablehook = lambda _: None  # a thread that was being started has nothing to say
        if number == signal.SIGUSR1 and SUPERVISED in os.environ:
            raise Interrupted
        raise Interrupted(f"Stopped by {signal.Signals(number).name}{to_continue(os.environ)}.")

    before, hook = [signal.signal(name, interrupt) for name in STOPS], sys.unraisablehook
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for name, handler in zip(STOPS, before, strict=True):
            if signal.getsignal(name) is interrupt:
                signal.signal(name, handler)


def _interruption(bug: BaseException) -> Interrupted | None:
    """Return the Interrupted that came while a thread was being started: Python's clean-up then raises a KeyError."""
    within, frames = bug.__context__, traceback.extract_tb(bug.__traceback__)
    if isinstance(within, Interrupted) and frames and frames[-1].filename == threading.__file__:
        return within
    return None


def _ignore_signals() -> None:
    for name in STOPS:
        signal.signal(name, signal.SIG_IGN)


def _in_a_line(bug: BaseException) -> str:
    """Return `Error: message (file.py:12 in function)`, which a user can put into a report."""
    what = traceback.format_exception_only(bug)[-1].strip()
    frames = traceback.extract_tb(bug.__traceback__)
    if not frames:
        return what
    at = frames[-1]
    return (
        f"{what} ({os.path.basename(at.filename)}:{at.lineno} in {at.name}; mpillm has a bug, or MPI failed)"
    )
