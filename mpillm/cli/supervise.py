"""`mpillm launch` on the command line: a supervisor that starts mpiexec."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.comm.launch import Launch
from mpillm.comm.program import library
from mpillm.errors import JobError, MpillmError

if TYPE_CHECKING:
    from mpillm.spec import Spec


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `launch`."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("-n", type=int, metavar="N", dest="ranks", help="number of ranks on this machine")
    where.add_argument(
        "--hostfile",
        type=Path,
        metavar="FILE",
        help="machines to use, one per line; lines may be added while it runs",
    )
    parser.add_argument(
        "--agent",
        default="ssh",
        metavar="COMMAND",
        help="command that starts a command on another machine (ssh)",
    )
    parser.add_argument(
        "--mpi-option",
        action="append",
        default=[],
        metavar="WORD",
        help="a further option for mpiexec; may be repeated",
    )
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="run ...", help="as for mpillm run")


def run(options: argparse.Namespace, read: Callable[[list[str]], Spec], started: Launch | None) -> int:
    """Run the supervisor and return the exit code. `read` makes a job of the words after `launch`.

    `started` says what has started this process as one of several.
    """
    # Imported here, because ranks must not load this before their threads are known.
    from mpillm.launching import mpiexec
    from mpillm.launching.supervisor import Supervisor

    if started is not None and started.size > 1:
        if started.rank == 0:
            _say(
                f"launch starts mpiexec by itself; type mpillm launch ... without {started.launcher} before it."
            )
        return 2
    try:
        if options.words[:1] != ["run"]:
            raise JobError(_no_run(options.words, options.ranks or 2))
        if options.ranks is None and options.hostfile is None:
            raise JobError(
                "launch needs a number of ranks or machines: mpillm launch -n 2 run, or --hostfile FILE."
            )
        if options.ranks is not None and options.ranks < 1:
            raise JobError(f"-n {options.ranks} is not a number of ranks.")
        settings = mpiexec.Settings(options.ranks, options.hostfile, options.agent, tuple(options.mpi_option))
        program = mpiexec.program(options.words)
        return Supervisor(read(options.words), library(), settings, program, _say).run()
    except MpillmError as error:
        _say(str(error))
        return error.exit_code


def _no_run(words: list[str], ranks: int) -> str:
    """A sentence on words that do not begin with `run`."""
    if words and words[0].endswith(".toml"):
        return f"launch needs the command before the job: mpillm launch -n {ranks} run {words[0]}."
    if words and words[0] in ("doctor", "serve", "chat", "bench", "pack"):
        return f"launch starts only runs; type mpiexec -n {ranks} python -m mpillm {' '.join(words)}."
    return "launch starts runs: mpillm launch -n 2 run JOB.toml."


def _say(line: str) -> None:
    sys.stderr.write(f"mpillm: {line}\n")
    sys.stderr.flush()
