"""Which pages of memory are there."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

from mpillm.weights.io.reading import Bytes


def resident(memory: Bytes) -> float:
    """Return the share of the pages that the system has given."""
    pages = -(-memory.nbytes // mmap.PAGESIZE)
    there = (ctypes.c_ubyte * pages)()
    address = memory.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(memory.nbytes), there)
    return sum(page & 1 for page in there) / pages


def mapped(memory: Bytes) -> float:
    """Return the share of the pages that can be looked at without a fault (bit 63 in /proc/self/pagemap)."""
    first = memory.ctypes.data // mmap.PAGESIZE
    pages = -(-(memory.ctypes.data + memory.nbytes) // mmap.PAGESIZE) - first
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(8 * first)
        entries = np.frombuffer(file.read(8 * pages), np.uint64)
    return float(np.mean(entries >> np.uint64(63)))
