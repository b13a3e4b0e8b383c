"""Report SIGBUS, which the system sends when it cannot read a page of a mapped file, in one sentence.

Loaders check files before they hand pages out. Afterwards the system may drop pages and read them again, and that
fails if the file has been shortened or its disk has failed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading

from mpillm.errors import ModelError

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_installed: list[object] = []  # C code refers to these handlers, so they must not be collected


def say_when_lost(sentence: str) -> None:
    """From now on a lost page ends the process with this line on stderr and a model error's exit code.

    Python's own signal handlers run between instructions, which a thread that waits for its page never reaches; C's
    run at once, in the thread that looked. The kernels let the interpreter go, so that thread can have it.
    """
    line, first = f"{sentence}\n".encode(errors="backslashreplace"), threading.Lock()

    def lost(_number: int) -> None:
        first.acquire()  # for good: other threads that lose pages wait here for the end
        os.write(2, line)
        os._exit(ModelError.exit_code)

    handler = _Handler(lost)
    _installed.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, _Handler)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGBUS, handler)
