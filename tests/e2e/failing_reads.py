"""Program for test_read_errors.py: `failing_reads.py RANKS NUMBER LOADS ARGUMENTS...` is mpillm whose model cannot be
read any more on some ranks (as 0,1): once they have loaded LOADS parts of layers, reading files ends with error NUMBER.

The kernel says so, told by a seccomp filter for all threads: read ahead, by rows and through maps alike.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
import sys
from typing import Any

from mpillm.cli import main
from mpillm.comm.world import World
from mpillm.weights.io.filesystem import POPULATE_READ

# preadv2 (as which Python and the C library call preadv), madvise and seccomp itself.
PREADV, MADVISE, SECCOMP = {"x86_64": (327, 28, 317), "aarch64": (286, 233, 277)}[platform.machine()]
ALLOW, FAIL = 0x7FFF0000, 0x50000
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # seccomp(2), in the words of its BPF
CALL, THIRD = 0, 16 + 2 * 8  # where struct seccomp_data has the call's number and its third argument


def fail_from_now_on(number: int) -> None:
    rules = [
        (LOAD, 0, 0, CALL),
        (EQUAL, 0, 1, PREADV),
        (RETURN, 0, 0, FAIL | number),
        (EQUAL, 0, 3, MADVISE),
        (LOAD, 0, 0, THIRD),
        (EQUAL, 0, 1, POPULATE_READ),
        (RETURN, 0, 0, FAIL | errno.EFAULT),  # what it says of a page that cannot be had
        (RETURN, 0, 0, ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = struct.pack("HP", len(rules), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.syscall(SECCOMP, 1, 1, program) == 0, ctypes.get_errno()  # SET_MODE_FILTER, FILTER_FLAG_TSYNC


def run(world: World, *args: Any) -> Any:
    """What computes is loaded only when the program's threads are known."""
    from mpillm.weights.paging.cache import WeightCache

    ranks, number, loads = sys.argv[1:4]
    original, left = WeightCache._load_next, int(loads)

    def load(cache: WeightCache[Any]) -> bool:
        nonlocal left
        left -= 1
        if left == 0 and str(world.rank) in ranks.split(","):
            fail_from_now_on(int(number))
        return original(cache)

    WeightCache._load_next = load  # type: ignore[method-assign]
    return threads(world, *args)


if __name__ == "__main__":
    threads = World.limit_threads
    World.limit_threads = run  # type: ignore[method-assign]
    sys.exit(main(sys.argv[4:]))
