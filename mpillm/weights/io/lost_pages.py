"""What happens when a page of a mapped file cannot be had: SIGBUS, which must end in a sentence and not in a crash.

Loaders look for trouble before they hand pages out. This is for what comes in between: the file is shortened, or its
disk fails, while a kernel looks at pages that the system had to take away and wants to read again.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading

from mpillm.errors import ModelError

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_installed: list[object] = []  # handlers that C knows must not be collected


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
