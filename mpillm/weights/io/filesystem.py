"""Facts of the system about a file: the kind of its file system; and calls that Python does not have."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
from pathlib import Path

import numpy as np

# statfs's f_type of file systems whose bytes come over a network (man 2 statfs, and the systems' own sources). There
# a page fault is slow, and one that fails kills the process.
NETWORK = {
    0x6969: "nfs",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
    0x19830326: "beegfs",
    0x00C36400: "ceph",
    0x517B: "smb",
    0xFE534D42: "smb2",
    0xFF534D42: "cifs",
    0x5346414F: "afs",
    0x6B414653: "kafs",
    0x01021997: "9p",
    0x65735546: "fuse",
    0x7461636F: "ocfs2",
    0x20030528: "orangefs",
    0xAAD7AAEA: "panfs",
    0x73757245: "coda",
}
IN_MEMORY = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}
POPULATE_READ = 22  # MADV_POPULATE_READ of linux/mman.h, since Linux 5.14
AROUND = 64 * 1024  # bytes that Linux maps around a page that is touched, if they are in the page cache
FOLIO = 2**21  # the maximum bytes of a folio, which Linux 6.18 maps whole; its size divides its offset

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.pwritev.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
_libc.pwritev.restype = ctypes.c_ssize_t
_MOST = 1024  # pieces that one pwritev(2) takes


def network_kind(path: Path) -> str | None:
    """Return the name of the network file system on which a file lies; None if it is a local one, or nobody knows."""
    return NETWORK.get(_type(path))


def in_memory(path: Path) -> bool:
    """Return whether what is written there takes memory, and no disk."""
    return _type(path) in IN_MEMORY


def _type(path: Path) -> int:
    """statfs's f_type of a file or folder, 0 if there is none."""
    found = ctypes.create_string_buffer(512)  # struct statfs begins with f_type, a C long on Linux
    if _libc.statfs(os.fsencode(path), found):
        return 0
    return ctypes.c_long.from_buffer(found).value & 0xFFFFFFFF


def madvise(address: int, nbytes: int, advice: int) -> None:
    """madvise(2), during which other threads run (mmap.madvise holds them up); OSError if it fails."""
    if _libc.madvise(address, nbytes, advice):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def same_bytes(one: int, other: int, nbytes: int) -> bool:
    """Return whether the bytes from two addresses on are alike; other threads run meanwhile."""
    return bool(_libc.memcmp(one, other, nbytes) == 0)


def cached(descriptor: int, offset: int, nbytes: int) -> bool:
    """Return whether the page cache has both ends of these bytes of a file: then most likely all of them."""
    byte = bytearray(1)
    try:
        return all(
            os.preadv(descriptor, [byte], at, os.RWF_NOWAIT) == 1 for at in (offset, offset + nbytes - 1)
        )
    except (AttributeError, OSError):  # not there, or a file system that cannot tell
        return False


def map_cached(address: int, nbytes: int, sink: int) -> bool:
    """Map pages that the page cache has; False if one of those that were touched cannot be read.

    Takes half the time of POPULATE_READ, which looks at each page: the kernel copies a byte of every `AROUND` bytes to
    the file `sink`, and so meets what would be a signal here.
    """
    first = -(-(address + 1) // AROUND) * AROUND
    touched = np.array([address, *range(first, address + nbytes, AROUND)], np.uintp)
    pieces = np.stack([touched, np.ones_like(touched)], axis=1)  # as struct iovec
    return all(
        _libc.pwritev(sink, some.ctypes.data, len(some), 0) == len(some)
        for some in (pieces[begin : begin + _MOST] for begin in range(0, len(pieces), _MOST))
    )


def reads_huge() -> bool:
    """Return whether a fault in a mapping of huge pages reads one: since Linux 5.18, and 2 MiB if pages have 4 KiB."""
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return mmap.PAGESIZE == 4096 and release is not None and tuple(map(int, release.groups())) >= (5, 18)


def can_populate() -> bool:
    """Return whether this kernel knows MADV_POPULATE_READ."""
    try:
        madvise(0, 0, POPULATE_READ)
    except OSError as error:
        return error.errno != errno.EINVAL
    return True
