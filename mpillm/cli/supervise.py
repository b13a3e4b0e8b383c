"""`mpillm launch` on the command line: mpiexec is started again and again for a run, and once for other commands."""

from __future__ import annotations

import argparse
import difflib
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.cli import terminal
from mpillm.comm.launch import STARTERS, Launch
from mpillm.comm.program import library
from mpillm.errors import JobError, MpillmError
from mpillm.words import listed

if TYPE_CHECKING:
    from mpillm.spec import Spec

# Seconds: Open MPI ends all ranks with the first one that fails, and may lose what others have said.
HEARD = 0.5
MAX_RANKS = 4096  # on this machine; mpiexec tries any number, and never ends with some
ONCE = ("doctor", "chat", "serve", "bench", "pack")  # commands with ranks that nothing starts again


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `launch`."""
    parser.add_argument("-n", type=int, metavar="N", dest="ranks", help="number of ranks on this machine")
    parser.add_argument(
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
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="COMMAND ...",
        help=f"run, which is started again after a failure, or {listed(ONCE, 'or')}",
    )


def run(
    options: argparse.Namespace,
    check: Callable[[list[str]], object],
    read: Callable[[list[str]], Spec],
    started: Launch | None,
) -> int:
    """Start the ranks and return the exit code.

    `check` parses the words after `launch`, and `read` makes a job of them. `started` says what has started this
    process as one of several.
    """
    # Imported here, because ranks must not load this before their threads are known.
    from mpillm.launching import mpiexec, reach
    from mpillm.launching.once import once
    from mpillm.launching.remarks import Remarks
    from mpillm.launching.supervisor import Supervisor

    if started is not None and started.size > 1:
        return refused(
            started,
            f"launch starts mpiexec by itself; type mpillm launch ... without {started.launcher} before it.",
        )
    try:
        words = [word for word in options.words if word != "--"]
        command = words[:1]
        if command not in (["run"], *([name] for name in ONCE)):
            raise JobError(_no_command(words, options.ranks or 2))
        if options.ranks is not None and options.hostfile is not None:
            raise JobError(
                f"{options.hostfile} says how many ranks each machine takes; change its slots, or leave out -n."
            )
        if options.ranks is None and options.hostfile is None:
            raise JobError(_no_ranks(words))
        if options.ranks is not None and not 1 <= options.ranks <= MAX_RANKS:
            raise JobError(f"-n {options.ranks} is not a number of ranks; write 1 to {MAX_RANKS}.")
        settings = mpiexec.Settings(options.ranks, options.hostfile, options.agent, tuple(options.mpi_option))
        program = mpiexec.program(words)
        if command != ["run"]:
            check(words)
            hosts = reach.answering(settings, _say)
            sys.stdout.flush()
            return once(
                library(), settings, hosts, program, _say, Remarks(_show, _show_error), command == ["chat"]
            )
        return Supervisor(read(words), library(), settings, program, _say, _show, _show_error).run()
    except MpillmError as error:
        _say(str(error))
        return error.exit_code


def refused(started: Launch, why: str) -> int:
    """Return the exit code of a command that no launcher may start, after the first process has said why."""
    if started.rank:
        time.sleep(HEARD)
    else:
        _say(why)
    return JobError.exit_code


def _no_ranks(words: list[str]) -> str:
    """Return a sentence on a command without ranks, which may stand after it."""
    for number, word in enumerate(words[:-1]):
        if word in ("-n", "-np", "--hostfile"):
            moved = [
                "-n" if word == "-np" else word,
                words[number + 1],
                *words[:number],
                *words[number + 2 :],
            ]
            return f"{word} must come before the command: mpillm launch {shlex.join(moved)}."
    return f"launch needs a number of ranks or machines: mpillm launch -n 2 {words[0]}, or --hostfile FILE."


def _no_command(words: list[str], ranks: int) -> str:
    """Return a sentence on words that do not begin with a command that launch starts."""
    if words[1:] and words[0].isdecimal():
        return f"the number of ranks needs -n: mpillm launch -n {shlex.join(words)}."
    if words and words[0] in STARTERS:
        meant = shlex.join(words[1:]) or "run JOB.toml"
        return f"launch starts {words[0]} by itself; type mpillm launch -n {ranks} {meant}."
    if words and words[0].endswith(".toml"):
        return f"launch needs the command before the job: mpillm launch -n {ranks} run {words[0]}."
    if words[1:] and words[1] in ("run", *ONCE):
        return f"{words[0]} is no command; if it is a hostfile, type mpillm launch --hostfile {shlex.join(words)}."
    if words and words[0] == "python":
        return f"launch starts commands of mpillm alone; type mpiexec -n {ranks} {shlex.join(words)}."
    if words and (close := difflib.get_close_matches(words[0], ("run", *ONCE), n=1)):
        return f"launch cannot start {words[0]!r}; did you mean {close[0]}?"
    if words and not words[0].startswith("-"):
        return f"launch starts {listed(('run', *ONCE), 'and')}; type mpillm {shlex.join(words)} without it."
    return "launch needs a command: mpillm launch -n 2 run JOB.toml."


def _say(line: str) -> None:
    _show_error(f"mpillm: {line}")


def _show_error(line: str) -> None:
    sys.stderr.write(f"{terminal.blank(sys.stderr)}{line}\n")  # ranks that were killed have left a live line
    sys.stderr.flush()


def _show(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
