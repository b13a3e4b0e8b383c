"""How fast the disk gives a model's own files, read one after the other past the page cache: paging's limit."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from ...weights.packed_layout import PAGE
from ...weights.reading import new_buffer, open_direct, read_direct

READERS = (1, 4)  # the faster one counts: some disks want several requests at a time, others one
REQUEST_BYTES = 16 * 2**20
MOST_BYTES = 2 * 2**30  # that are read with each number of readers


def rate(paths: Sequence[Path]) -> float | None:
    """Bytes a second of the fastest way; None where the file system cannot be read past the page cache."""
    with ExitStack() as stack:
        files = []
        for path in paths:
            descriptor = open_direct(path)
            if descriptor < 0:
                return None
            stack.callback(os.close, descriptor)
            files.append(descriptor)
        return max(_rate(files, readers) for readers in READERS)


def _rate(files: Sequence[int], readers: int) -> float:
    buffers = [new_buffer(REQUEST_BYTES, PAGE) for _ in range(readers)]
    for buffer in buffers:
        buffer[:] = 0  # what the system takes to find pages for it is not the disk's time
    requests = list(_requests(files))

    def read(reader: int) -> int:
        mine = requests[reader::readers]
        return sum(REQUEST_BYTES for file, at in mine if read_direct(file, at, buffers[reader]))

    with ThreadPoolExecutor(readers) as pool:
        begun = time.perf_counter()
        total = sum(pool.map(read, range(readers)))
        return total / (time.perf_counter() - begun)


def _requests(files: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Whole requests of the files, in the order in which they lie there."""
    left = MOST_BYTES // REQUEST_BYTES
    for file in files:
        for number in range(min(os.fstat(file).st_size // REQUEST_BYTES, left)):
            left -= 1
            yield file, number * REQUEST_BYTES
