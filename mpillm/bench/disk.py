"""Measure how fast the disk reads a model's files in order without the page cache: the limit of paging."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mpillm.weights.io.reading import new_buffer, open_direct, read_direct
from mpillm.weights.packed.layout import PAGE

# The faster one counts: some disks need several requests at a time, others are slower with them.
READERS = (
    1,
    4,
)
REQUEST_BYTES = 16 * 2**20
MAX_BYTES = 2**30  # read with each number of readers
# Requests use different buffers, as those for weights do. On a virtual machine a processor copies the data, and copying
# to memory that is in its cache may seem 1.5 times as fast.
MEMORY_BYTES = 8 * REQUEST_BYTES


class DiskReader:
    """Reads a model's files over and over; `rates` has the result of each measurement, in bytes per second."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.rates: list[float] = []
        self._files = [open_direct(path) for path in paths]
        self._requests = [
            (file, number * REQUEST_BYTES)
            for file in self._files
            if file >= 0
            for number in range(os.fstat(file).st_size // REQUEST_BYTES)
        ]
        self._next = 0

    def measure(self) -> None:
        """Measure the rate with the best number of readers, if the files can be read past the page cache."""
        if min(self._files, default=-1) >= 0 and self._requests:
            self.rates.append(max(self._rate(readers) for readers in READERS))

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            if file >= 0:
                os.close(file)
        self._files = []

    def _rate(self, readers: int) -> float:
        memory = new_buffer(MEMORY_BYTES, PAGE)
        memory[:] = 0  # so that the time of allocating its pages is not counted
        count = min(MAX_BYTES // REQUEST_BYTES, len(self._requests))
        numbers = range(self._next, self._next + count)
        self._next += count

        def read(number: int) -> int:
            file, at = self._requests[number % len(self._requests)]
            out = memory[number * REQUEST_BYTES % MEMORY_BYTES :][:REQUEST_BYTES]
            return REQUEST_BYTES if read_direct(file, at, out) else 0

        with ThreadPoolExecutor(readers) as pool:
            start = time.perf_counter()
            total = sum(pool.map(read, numbers))
            return total / (time.perf_counter() - start)
