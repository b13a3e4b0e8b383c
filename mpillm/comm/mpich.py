"""Take the name from shared memory that MPICH removes only at an orderly end."""

from __future__ import annotations

import contextlib
import os

from mpillm.comm.launch import mapped_files

_NAMES = "/dev/shm/mpich_shm_"


def unlink_shared_memory() -> None:
    """Unlink the memory that this process shares with others on its machine; all must have opened it by now.

    It goes with the last process that has it. With its name, the memory of ranks that are killed would be taken until
    the machine starts anew.
    """
    for name in sorted(set(mapped_files())):
        if name.startswith(_NAMES):
            with contextlib.suppress(OSError):  # another rank was faster
                os.unlink(name)
