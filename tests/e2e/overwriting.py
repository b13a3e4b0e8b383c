"""Program for test_overwritten.py: `overwriting.py FILE WAY run WORD...` runs a job one of whose files changes.

When five answers are in the journal the file is changed in place, without a trace in its times; the model is
looked at after every step from then on.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mpillm.cli import main
from mpillm.store.journal import Journal
from mpillm.store.records import Result
from mpillm.weights import identity

AFTER = 5  # answers


def change(path: Path, way: str) -> None:
    """Change what a mapping of the file shows."""
    times, size = path.stat(), path.stat().st_size
    if way == "shortened":
        os.truncate(path, size // 2)
    else:
        offset, count = (0, size) if way == "overwritten" else (size * 2 // 3, 100)
        with path.open("r+b") as file:
            file.seek(offset)
            data = file.read(count)
            file.seek(offset)
            file.write(bytes(byte ^ 0x55 for byte in data))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def disturb(path: Path, way: str) -> None:
    append, answered = Journal.append, 0

    def counting(self: Journal, record: object) -> None:
        nonlocal answered
        append(self, record)  # type: ignore[arg-type]
        answered += isinstance(record, Result)
        if isinstance(record, Result) and answered == AFTER:
            change(path, way)
            identity.CHECK_EVERY = 0.0

    Journal.append = counting  # type: ignore[method-assign]


if __name__ == "__main__":
    file, way, *words = sys.argv[1:]
    disturb(Path(file), way)
    sys.exit(main(words))
