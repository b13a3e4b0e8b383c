"""What may happen to the files of a run: its output is moved, deleted or damaged, its model is edited."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from mpillm.store.output import JOURNAL
from mpillm.store.records import scan

FLIPPED = 300  # bytes at most in which bits are flipped: one of the journal's two headers, never both


class Files:
    """Disturbs files, and puts back what a job cannot do without."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._undo: list[Callable[[], object]] = []

    def undo(self) -> None:
        """Put back what was moved or edited."""
        while self._undo:
            self._undo.pop()()

    def move(self, output: Path) -> None:
        """Rename the output directory."""
        away = output.with_name(f"{output.name}-moved")
        output.rename(away)
        self._undo.append(lambda: away.rename(output))

    def delete(self, output: Path) -> None:
        """Delete the output directory, in which files may appear meanwhile."""
        while output.exists():
            with contextlib.suppress(OSError):
                shutil.rmtree(output)

    def flip_bits(self, output: Path) -> bool:
        """Flip some neighbouring bits of the journal; False if it has only one header left, or none."""
        try:
            file = os.open(output / JOURNAL, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            size = os.fstat(file).st_size
            if scan(file).headers < 2:
                return False
            at = self._draw.randrange(size)
            before = os.pread(file, self._draw.choice((1, 8, FLIPPED)), at)
            os.pwrite(file, bytes(byte ^ 1 << self._draw.randrange(8) for byte in before), at)
        finally:
            os.close(file)
        return True

    def edit(self, *folders: Path) -> str:
        """Change a file of a model or an adapter in one of several ways, and say which; `undo` puts it back."""
        path = self._draw.choice([file for folder in folders for file in _files_of(folder)])
        content, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        at = self._draw.randrange(len(content))

        def restore() -> None:
            path.write_bytes(content)
            os.utime(path, ns=times)

        self._undo.append(restore)
        how = self._draw.choice(("overwritten", "lengthened", "shortened", "replaced", "removed"))
        if how == "overwritten":
            with path.open("r+b") as file:
                file.seek(at)
                file.write(bytes(255 - byte for byte in content[at : at + 100]))
            os.utime(path, ns=times)
        elif how == "lengthened":
            path.write_bytes(content + b"\n")
        elif how == "shortened":
            os.truncate(path, at)
        elif how == "replaced":
            new = path.with_name("new")
            new.write_bytes(content[:at] + b" " + content[at:])
            new.replace(path)
        else:
            path.unlink()
        return f"{path.name} {how}"

    def touch(self, model: Path) -> None:
        """Write one of a model's files again as it is, in place: one that is shortened first is a changed one."""
        path = self._draw.choice(_files_of(model))
        content = path.read_bytes()
        with path.open("r+b") as file:
            file.write(content)


def _files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())
