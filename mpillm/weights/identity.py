"""The identity of a model by all files that decide its answers, and a watch that they do not change during use.

Files that are small, headers, and small tensors (norms, biases) are hashed whole; of large files it is their size, the
time of their last change, and samples.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import msgspec

from mpillm.errors import ModelError
from mpillm.weights.text_files import TokenizerSource, text_files

SAMPLES = 64  # the number of samples of a file, which are evenly spread
SAMPLE_BYTES = 4096
ENDS_BYTES = 64 * 1024  # bytes of the beginning and of the end of a file
SMALL = 64 * 1024  # bytes of a tensor that is hashed whole: norms and biases, no matrix of a small model
CHECK_EVERY = 2.0  # seconds between two looks at the files


_Stretches = list[tuple[int, int]] | None
_Named = dict[str, tuple[Path, _Stretches]]


class ModelChangedError(ModelError):
    """A model's files have changed while a run was using them."""


class FileIdentity(msgspec.Struct, frozen=True):
    """The identity of a file; `modified` (seconds since 1970) is None if all of it is hashed."""

    bytes: int
    hash: str
    modified: int | None = None


class Files(Protocol):
    """The files that decide answers: those of a model or an adapter; see `Source`."""

    path: Path
    files: tuple[Path, ...]
    tokenizer: TokenizerSource

    def extents(self) -> Iterator[tuple[Path, int, int]]:
        """Return the place of all tensors in the files."""


def identity(source: Files) -> dict[str, FileIdentity]:
    """Return all files that decide the answers, by name; ModelError if one cannot be read."""
    return _identify_all(_named(source))


def fingerprint(source: Files) -> tuple[int, str]:
    """Return the bytes of a model's files and one hash for all of them: equal on all ranks that see one model."""
    return summed(identity(source))


def summed(files: dict[str, FileIdentity]) -> tuple[int, str]:
    """`fingerprint` of files that are identified already."""
    digest = hashlib.blake2b(digest_size=16)
    for name, file in files.items():
        digest.update(f"{name}\0{file.bytes}\0{file.hash}\0".encode())
    return sum(file.bytes for file in files.values()), digest.hexdigest()


def contents(files: dict[str, FileIdentity]) -> tuple[int, str]:
    """`summed` without the files' names: one host may call the same model another name than the others."""
    return summed({str(place): file for place, file in enumerate(files.values())})


class Watch:
    """Checks now and then whether the files of a model have changed since they were opened."""

    def __init__(self, source: Files, adapters: Mapping[str, Files] | None = None) -> None:
        """Note what the files are now, and those of the model's adapters; ModelError if one cannot be read."""
        self._parts = {"": source} | {f"adapters/{name}/": files for name, files in (adapters or {}).items()}
        self._named = self._all_named()
        try:
            self._states = {name: _state(path) for name, (path, _) in self._named.items()}
        except OSError as error:
            raise ModelError(f"{error.filename} cannot be read: {error.strerror}.") from None
        self.files = _identify_all(self._named)
        self._checked = time.monotonic()

    @property
    def state(self) -> str:
        """A hash of the files' inodes, sizes and times: it stays the same as long as nobody touches them."""
        return hashlib.blake2b(repr(list(self._states.values())).encode(), digest_size=8).hexdigest()

    def check(self) -> bool:
        """Check size and times of the files, if that is due; return whether it was.

        ModelChangedError names a file that has changed.
        """
        if time.monotonic() < self._checked + CHECK_EVERY:
            return False
        for name, (path, stretches) in self._named.items():
            try:
                state = _state(path)
            except FileNotFoundError:
                raise _changed(path) from None
            except OSError:  # a file server that does not answer; the next check, or a read, will tell
                continue
            if state != self._states.get(name):
                if _identify(path, stretches) != self.files.get(name):
                    raise _changed(path)
                self._states[name] = state
        self._checked = time.monotonic()
        return True

    def check_all(self) -> None:
        """Compute the identity of all files again; ModelChangedError names a file that has changed."""
        named = self._all_named()
        found = _identify_all(named)
        for name, (path, _) in {**self._named, **named}.items():
            if found.get(name) != self.files.get(name):
                raise _changed(path)

    def _all_named(self) -> _Named:
        return {
            prefix + name: file
            for prefix, files in self._parts.items()
            for name, file in _named(files).items()
        }


def _changed(path: Path) -> ModelChangedError:
    return ModelChangedError(
        f"The model's file {path} has changed while the run was using it. Put it back as it was and run the "
        "same command again: what was computed since the last successful check will be computed again."
    )


def _named(source: Files) -> _Named:
    """Return the files and their hashed parts, by their names in the directory of the model or adapter."""
    folder = source.path if source.path.is_dir() else source.path.parent
    return {
        str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name: (path, stretches)
        for path, stretches in _files(source).items()
    }


def _files(source: Files) -> dict[Path, _Stretches]:
    """Return the files, each with offset and length of what is hashed besides samples; None: all of it."""
    found: dict[Path, _Stretches] = dict.fromkeys(text_files(source.tokenizer))
    found.update(dict.fromkeys(path for path in source.files if path not in found))
    first: dict[Path, int] = {}
    for path, offset, nbytes in source.extents():
        stretches = found.get(path)
        if stretches is None:
            stretches = found[path] = []
        first[path] = min(first.get(path, offset), offset)
        if nbytes <= SMALL:
            stretches.append((offset, nbytes))
    for path, offset in first.items():
        found[path] = [(0, offset), *sorted(found[path] or ())]
    return found


def _state(path: Path) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _identify_all(named: _Named) -> dict[str, FileIdentity]:
    """Return the files' identities by name, several files at a time: a packed model has one for each layer."""
    with ThreadPoolExecutor(os.cpu_count() or 1, "files-identified") as pool:
        return dict(zip(named, pool.map(lambda file: _identify(*file), named.values()), strict=True))


def _identify(path: Path, stretches: _Stretches) -> FileIdentity:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb", buffering=0) as file:
            found = os.fstat(file.fileno())
            samples = _samples(found.st_size)
            whole = stretches is None or len(samples) == 1
            for offset, count in [(0, found.st_size)] if whole else [*(stretches or ()), *samples]:
                for data in _pieces(file.fileno(), offset, count):
                    digest.update(data)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from None
    return FileIdentity(found.st_size, digest.hexdigest(), None if whole else int(found.st_mtime))


def _pieces(file: int, offset: int, count: int) -> Iterator[bytes]:
    """`count` bytes from `offset` on, fewer at the end of the file."""
    while count and (data := os.pread(file, min(count, 2**20), offset)):
        yield data
        offset, count = offset + len(data), count - len(data)


def _samples(size: int) -> list[tuple[int, int]]:
    """Offsets and lengths: all of a small file, else both ends and samples between them."""
    if size <= 2 * ENDS_BYTES + SAMPLES * SAMPLE_BYTES:
        return [(0, size)]
    between = [(i * (size - SAMPLE_BYTES) // (SAMPLES - 1), SAMPLE_BYTES) for i in range(SAMPLES)]
    return [(0, ENDS_BYTES), *between, (size - ENDS_BYTES, ENDS_BYTES)]
