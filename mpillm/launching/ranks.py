"""The ranks of a caller's process: a process of its own that becomes mpiexec.

It imports nothing that starts MPI, which would take a second and leave what it has made.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

from mpillm.comm.program import library
from mpillm.launching.mpiexec import Settings, command, program


def start(ranks: int, address: str) -> NoReturn:
    """Become mpiexec with `ranks` ranks; the files that it writes are beside the socket at `address`."""
    folder = Path(address).parent
    words = [*command(library(), Settings(ranks), ranks, None, folder), *program(["ranks", address])]
    os.execvp(words[0], words)
