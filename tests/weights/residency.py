"""Which pages of memory are there."""

from __future__ import annotations

import ctypes
import mmap

from mpillm.weights.io.reading import Bytes


def resident(memory: Bytes) -> float:
    """Return the share of the pages that the system has given."""
    pages = -(-memory.nbytes // mmap.PAGESIZE)
    there = (ctypes.c_ubyte * pages)()
    address = memory.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(memory.nbytes), there)
    return sum(page & 1 for page in there) / pages
