"""OpenAI's files: what clients upload, and the results of batches, each with its description in a file beside it."""

from __future__ import annotations

import hashlib
import re
import time
import uuid
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from mpillm.errors import MpillmError
from mpillm.store.directory import Directory, replacing

_ID = re.compile(r"(file|batch)-[0-9a-f]{24}")
_COPY = 1 << 20  # bytes at a time


class File(msgspec.Struct, kw_only=True):
    """An uploaded file, or a batch's results, as OpenAI describes it."""

    id: str
    object: str = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str = "processed"


def new_digits() -> str:
    """24 hexadecimal digits of an id, which grow with time: they order what was made within a second."""
    return f"{time.time_ns():016x}{uuid.uuid4().hex[:8]}"


class Descriptions:
    """Descriptions in a directory, one JSON file each."""

    def __init__(self, folder: Path, kind: type[msgspec.Struct]) -> None:
        self.folder, self._kind = folder, kind
        folder.mkdir(parents=True, exist_ok=True)
        with Directory(folder) as directory:
            directory.remove_temporary_files()

    def path(self, name: str) -> Path:
        """Return the path of the content of `name`; KeyError if that is no id."""
        if not _ID.fullmatch(name):
            raise KeyError(name)
        return self.folder / name

    def read(self, name: str) -> Any:
        """Return the description of `name`; KeyError if there is none."""
        try:
            return msgspec.json.decode(self.path(name).with_suffix(".json").read_bytes(), type=self._kind)
        except FileNotFoundError:
            raise KeyError(name) from None

    def write(self, described: Any) -> None:
        """Keep a description, in place of an earlier one."""
        with replacing(self.path(described.id).with_suffix(".json")) as file:
            file.write(msgspec.json.encode(described))

    def all(self) -> list[Any]:
        """Return all descriptions, the newest first."""
        found = [self.read(path.stem) for path in self.folder.glob("*.json") if _ID.fullmatch(path.stem)]
        return sorted(found, key=lambda each: (each.created_at, each.id), reverse=True)


class FileStore:
    """The uploaded files, and the results of batches."""

    def __init__(self, folder: Path) -> None:
        self._descriptions = Descriptions(folder, File)
        self.read, self.all = self._descriptions.read, self._descriptions.all
        for path in folder.glob("file-*"):  # contents that a killed server has not described, or not removed
            if _ID.fullmatch(path.name) and not path.with_suffix(".json").exists():
                path.unlink()

    def add(self, name: str, purpose: str, source: BinaryIO, own: str | None = None) -> File:
        """Keep the content of a file; in place of an earlier one of the same `own` name, if it has one."""
        made = File(
            id=f"file-{hashlib.sha256(own.encode()).hexdigest()[:24] if own else new_digits()}",
            bytes=0,
            created_at=int(time.time()),
            filename=name[:255] or "file",
            purpose=purpose,
        )
        path = self._descriptions.path(made.id)
        with replacing(path) as file:
            while piece := source.read(_COPY):
                made.bytes += file.write(piece)
        try:
            self._descriptions.write(made)
        except MpillmError:
            if not path.with_suffix(".json").exists():
                path.unlink()
            raise
        return made

    def content(self, name: str) -> Path:
        """Return the path of a file's content; KeyError if there is no such file."""
        self.read(name)
        return self._descriptions.path(name)

    def delete(self, name: str) -> None:
        """Forget a file."""
        path = self.content(name)
        path.with_suffix(".json").unlink()
        path.unlink(missing_ok=True)
