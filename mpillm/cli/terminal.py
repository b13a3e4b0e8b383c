"""Find where the lines of a rank are shown: on a terminal, in a file, or in a pipe.

Under mpiexec the streams of a rank are pipes to the launcher. Open MPI's holds back what has no newline, so a line that
is drawn again and again appears at the end; what is written when the launcher is told to stop is lost; and what is
written to two pipes arrives in any order. So rank 0 looks at where the launcher itself writes, if it is on its machine,
or where its supervisor (`mpillm launch`) does, which shows what the launcher writes.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
import textwrap
from typing import TextIO

import psutil

from mpillm.comm import launch

USUAL = 80  # columns of a terminal


def terminal_of_launcher(stream: int) -> TextIO | None:
    """Rank 0's way to the terminal that its launcher has as stream 1 or 2; None if that is no terminal."""
    folder = _launcher_streams()
    started = launch.launched_by(os.environ)
    if folder is None or started is None or started.rank > 0:
        return None
    try:
        descriptor = os.open(f"{folder}/{stream}", os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    if not os.isatty(descriptor):
        os.close(descriptor)
        return None
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "w", encoding="utf-8", errors="replace")


def launcher_reads_terminal() -> bool:
    """Return whether the launcher passes on what is typed on a terminal."""
    try:
        descriptor = os.open(
            f"{_launcher_streams()}/0", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
        )
    except OSError:
        return False
    try:
        return os.isatty(descriptor)
    finally:
        os.close(descriptor)


def launcher_input_ended() -> bool:
    """Return whether the launcher's own input, a pipe or a file, has ended: Open MPI's does not tell its ranks."""
    folder = _launcher_streams()
    if folder is None:
        return False
    try:
        place = os.stat(f"{folder}/0")
        if stat.S_ISREG(place.st_mode):
            with open(f"{os.path.dirname(folder)}/fdinfo/0") as file:
                return int(file.readline().split()[1]) >= place.st_size
        if not stat.S_ISFIFO(place.st_mode):
            return os.path.samestat(place, os.stat(os.devnull))
        descriptor = os.open(f"{folder}/0", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return [events for _, events in poll.poll(0)] == [
            select.POLLHUP
        ]  # no writer, and nothing left to read
    finally:
        os.close(descriptor)


def both_streams_meet() -> bool:
    """Return whether stdout and stderr go through a launcher that writes both to the same place."""
    folder = _launcher_streams()
    if folder is None:
        return False
    try:
        return os.path.samestat(os.stat(f"{folder}/1"), os.stat(f"{folder}/2"))
    except OSError:
        return False


def columns(stream: TextIO) -> int | None:
    """Return the width of the terminal that a stream writes to; None if it is none, or has no width.

    After su the launcher's terminal belongs to another user and tells nothing; it is taken to have the usual width.
    """
    try:
        if stream.isatty():
            return os.get_terminal_size(stream.fileno()).columns or None
        folder = _launcher_streams()
        shown = "" if folder is None else os.readlink(f"{folder}/{stream.fileno()}")
    except (OSError, ValueError):
        return None
    return USUAL if shown.startswith(("/dev/pts/", "/dev/tty")) else None


def blank(stream: TextIO) -> str:
    """Return the text that empties a terminal's last line (a live line, or `^C`); "" for other streams."""
    width = columns(stream)
    return "" if width is None else f"\r{' ' * (width - 1)}\r"


def fitted(text: str, stream: TextIO) -> str:
    """Return the text, its lines broken between words where the stream's terminal would break them inside one."""
    width = columns(stream)
    if width is None or len(text) <= width:
        return text
    return "\n".join(
        textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        for line in text.split("\n")
    )


def _launcher_streams() -> str | None:
    """Return the descriptors of the outermost MPI launcher that this process descends from, or of its supervisor."""
    found, supervisor = None, os.environ.get(launch.SUPERVISED)
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            if os.path.basename(process.exe()) not in launch.STARTERS and str(process.pid) != supervisor:
                break
            found = f"/proc/{process.pid}/fd"
    return found
