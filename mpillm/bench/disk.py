"""How fast the disk gives a model's own files, read one after the other past the page cache: paging's limit."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mpillm.weights.io.reading import new_buffer, open_direct, read_direct
from mpillm.weights.packed.layout import PAGE

READERS = (1, 4)  # the faster one counts: some disks want several requests at a time, others one
REQUEST_BYTES = 16 * 2**20
MOST_BYTES = 2**30  # that are read with each number of readers
# Requests go to different memory, as weights do: where a disk is the work of a processor (a virtual machine's), it may
# write half as fast again to what still lies in a cache.
ROOM = 8 * REQUEST_BYTES


class Disk:
    """A model's files, read on and on; `rates` has what each time gave, in bytes a second."""

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
        """Note the rate of the fastest way, if the files can be read past the page cache and are large enough."""
        if min(self._files, default=-1) >= 0 and self._requests:
            self.rates.append(max(self._rate(readers) for readers in READERS))

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files:
            if file >= 0:
                os.close(file)
        self._files = []

    def _rate(self, readers: int) -> float:
        memory = new_buffer(ROOM, PAGE)
        memory[:] = 0  # what the system takes to find pages for it is not the disk's time
        count = min(MOST_BYTES // REQUEST_BYTES, len(self._requests))
        numbers = range(self._next, self._next + count)
        self._next += count

        def read(number: int) -> int:
            file, at = self._requests[number % len(self._requests)]
            out = memory[number * REQUEST_BYTES % ROOM :][:REQUEST_BYTES]
            return REQUEST_BYTES if read_direct(file, at, out) else 0

        with ThreadPoolExecutor(readers) as pool:
            begun = time.perf_counter()
            total = sum(pool.map(read, numbers))
            return total / (time.perf_counter() - begun)
