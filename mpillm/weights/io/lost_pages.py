"""Report SIGBUS, which the system sends when it cannot read a page of a mapped file, in one sentence.

Loaders check files before they hand pages out. Afterwards the system may drop pages and read them again, and that
fails if the file has been shortened or its disk has failed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from pathlib import Path

from mpillm.errors import ModelError

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_installed: list[object] = []  # C code refers to these handlers, so they must not be collected

SA_SIGINFO = 4
ADDRESS = 16  # offset of `si_addr` in a siginfo_t of a 64-bit system


class _Action(ctypes.Structure):
    """`struct sigaction`."""

    _fields_ = (
        ("handler", _Handler),
        ("mask", ctypes.c_byte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def say_when_lost(who: str, model: Path) -> None:
    """From now on a lost page ends the process with a line on stderr and a model error's exit code.

    It begins with `who` and names the file, or else the model. Python's own signal handlers run between instructions,
    which a thread that waits for its page never reaches; C's run at once, in the thread that looked. The kernels let
    the interpreter go, so that thread can have it.
    """
    first = threading.Lock()

    def lost(_number: int, info: int, _context: int) -> None:
        first.acquire()  # never released: other threads that lose pages wait here for the end
        file = mapped_at(ctypes.c_size_t.from_address(info + ADDRESS).value) or model
        line = (
            f"{who} {file} was shortened or cannot be read any more while it was in use (or /dev/shm is full); "
            "put it back and run the same command again.\n"
        )
        os.write(2, line.encode(errors="backslashreplace"))
        os._exit(ModelError.exit_code)

    handler = _Handler(lost)
    _installed.append(handler)
    libc = ctypes.CDLL(None)
    libc.sigaction(signal.SIGBUS, ctypes.byref(_Action(handler, flags=SA_SIGINFO)), None)


def mapped_at(address: int) -> str | None:
    """Return the file that is mapped at an address of this process, if any."""
    try:
        with open("/proc/self/maps", "rb") as maps:
            for line in maps:
                stretch, *_, name = line.rstrip(b"\n").split(maxsplit=5)
                begin, end = (int(part, 16) for part in stretch.split(b"-"))
                if begin <= address < end:
                    return os.fsdecode(name) if name.startswith(b"/") else None
    except OSError:
        pass
    return None
