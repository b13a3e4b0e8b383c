"""Check and set the environment of a rank before anything large is loaded.

NumPy's and MPI's libraries end the process by themselves, without a sentence, where they get no memory, no thread or
no file. So limits under which they cannot even start are said beforehand.
"""

from __future__ import annotations

import os
import pwd
import resource
import tempfile
from pathlib import Path

from mpillm.errors import JobError

MIN_FILES = 64  # open ones, of which MPI takes most
# Bytes that Python, NumPy and MPI take before any model is there, by the limit that they count for.
MIN_SIZES = (
    (resource.RLIMIT_AS, "memory (ulimit -v)", 256 << 20),
    (resource.RLIMIT_DATA, "data (ulimit -d)", 160 << 20),
    (resource.RLIMIT_STACK, "the stack (ulimit -s)", 1 << 20),
)
MIN_TASKS = 24  # processes and threads of a rank besides those that compute
FEW_TASKS = 4096  # a limit beyond is not compared with what runs


def prepare() -> None:
    """Make what is missing where that is possible; JobError says what limit is too low."""
    _files()
    for limit, name, minimum in MIN_SIZES:
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY and soft < minimum:
            raise JobError(
                f"The limit of {name} is {soft >> 10} KiB, but a rank needs at least {minimum >> 10} KiB "
                "without a model; raise it."
            )
    _tasks()
    # As many threads as there are cores would look for work for 0.1 s while everything else is loaded, in each rank.
    # `cores.limit_threads` sets the number when it is known.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        if (folder := tempfile.gettempdir()) != "/tmp":
            os.environ["TMPDIR"] = folder  # Open MPI looks at this and at /tmp alone
    except FileNotFoundError:
        raise JobError("There is no directory for temporary files (/tmp); set TMPDIR to one.") from None
    if not os.environ.get("HOME"):  # Open MPI does not start without it
        try:
            os.environ["HOME"] = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            os.environ["HOME"] = "/"


def _files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_FILES:
        if hard != resource.RLIM_INFINITY and hard < MIN_FILES:
            raise JobError(
                f"The limit of open files (ulimit -n) is {soft}, but a rank needs {MIN_FILES}; raise it."
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (MIN_FILES, hard))


def _tasks() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if os.geteuid() == 0 or soft == resource.RLIM_INFINITY or soft > FEW_TASKS:
        return
    running = sum(map(_threads, Path("/proc").glob("[0-9]*")))
    if soft - running < MIN_TASKS:
        raise JobError(
            f"The limit of processes and threads (ulimit -u) is {soft}, {running} are in use, and a "
            f"rank "
            f"needs {MIN_TASKS} more; raise it."
        )


def _threads(process: Path) -> int:
    """Return the threads of a process, if it is this user's."""
    try:
        return len(os.listdir(process / "task")) if process.stat().st_uid == os.geteuid() else 0
    except OSError:
        return 0  # it has ended meanwhile
