"""The results, made from the input's lines and the journal: results.jsonl and results.h5.

results.jsonl and results.h5 are the same bytes for the same job, however often it was stopped. What differs from run
to run stays out of them: the timings lie in timings.h5, which results.h5 links to as its group /timings, and the
layout, hosts and rates in report.json.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from mpillm import __version__
from mpillm.batch.answers import bad_line, error_line, result_line
from mpillm.batch.endpoints import COLUMNS
from mpillm.batch.work import Line, Model, Work
from mpillm.engine.sequence import Completion
from mpillm.store.journal import Choice, Journal, Result, line_key
from mpillm.store.output import replacing

JSONL, HDF5, TIMINGS = "results.jsonl", "results.h5", "timings.h5"

_IDS = np.dtype("<i4")
_PENDING = 1 << 16  # values of a column that are held before they are written


def finished(work: Work, completions: Sequence[Completion], model: Model) -> Result:
    """The journal's record of a request that went well; `completions` in the order of `work.requests`."""
    line = result_line(work, completions, model)
    prompts = [_bytes(prompt, _IDS) for prompt in work.prompts]
    choices = [_choice(work, completion) for completion in completions]
    return Result(work.custom_id, line_key(work.line), 200, line, prompts, choices)


def failed(work: Work, message: str, status: int = 400) -> Result:
    """The journal's record of a request that ended in an error."""
    return Result(work.custom_id, line_key(work.line), status, error_line(work.custom_id, message, status))


def _choice(work: Work, completion: Completion) -> Choice:
    values = work.endpoint.values(completion)
    return Choice(
        finish_reason=completion.finish_reason,
        values={
            column.group: _bytes(values[column.group], np.dtype(column.dtype))
            for column in work.endpoint.columns
            if column.group in values
        },
        seconds_waiting=completion.seconds_waiting,
        seconds_running=completion.seconds_running,
    )


def _bytes(values: ArrayLike, kind: np.dtype[Any]) -> bytes:
    return np.asarray(values, kind).tobytes()


def write_jsonl(directory: Path, lines: Iterable[Line], journal: Journal) -> int:
    """Write results.jsonl: every line of the input once, in its order; return how many ended in an error."""
    errors = 0
    with replacing(directory / JSONL) as file:
        for line in lines:
            if line.error is not None:
                errors += 1
                file.write(bad_line(line))
            else:
                result = journal.read(line.custom_id)
                errors += result.status != 200
                file.write(result.line)
            file.write(b"\n")
    return errors


def write_hdf5(directory: Path, lines: Sequence[Line], journal: Journal, metadata: Mapping[str, Any]) -> None:
    """Write results.h5 and timings.h5.

    `metadata` (what the results depend on: model, sampling, wire, ...) becomes attributes of the root. Groups:

    requests: custom_id (see `hdf5_text`), line (from 1), status, and choices [n + 1]: request i has choices[i] up to
    choices[i + 1].
    choices: prompt (index into /prompts), finish_reason.
    prompts, tokens: ids (int32) with offsets [.. + 1]; logprobs, prompt_logprobs, embeddings: values (float32)
    with offsets. An answer without them has none; prompt_logprobs begin at the prompt's second token; embeddings
    are as the model gave them, not normalised.
    """
    with _hdf5(directory / HDF5) as (h5, check), _hdf5(directory / TIMINGS) as (timings_h5, check_timings):
        _describe(h5, metadata)
        h5["timings"] = h5py.ExternalLink(TIMINGS, "/")
        columns = _Columns(h5)
        waiting = _Column(timings_h5, "seconds_waiting", np.float64)
        running = _Column(timings_h5, "seconds_running", np.float64)
        for line in lines:
            result = None if line.error is not None else journal.read(line.custom_id)
            columns.add(line, result)
            check()
            check_timings()
            for choice in result.choices if result else ():
                waiting.add([choice.seconds_waiting])
                running.add([choice.seconds_running])
        for column in (waiting, running):
            column.close()
        columns.close()


def hdf5_text(text: str) -> str:
    """A string as results.h5 stores it: a JSON string if it has a zero character, which HDF5 cannot store.

    A string that begins with a double quote becomes a JSON string too, so that a reader can tell the two apart.
    """
    if "\0" in text or text.startswith('"'):
        return msgspec.json.encode(text).decode()
    return text


class _Guarded:
    """A file for the HDF5 library, which crashes if one that it has open cannot be written.

    So none of this raises: a failed write's error is kept and nothing more is written, until someone calls `check`.
    """

    def __init__(self, file: int) -> None:
        self._file = file  # a descriptor
        self._at = 0
        self._error: OSError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (os.fstat(self._file).st_size if whence == os.SEEK_END else 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        """Zeros stand for what could not be written."""
        buffer[:] = self.read(len(buffer)).ljust(len(buffer), b"\0")
        return len(buffer)

    def read(self, size: int) -> bytes:
        return os.pread(self._file, size, self._at)

    def write(self, data: memoryview) -> int:
        left, at = memoryview(data).cast("B"), self._at
        try:
            while left and self._error is None:
                written = os.pwrite(self._file, left, at)
                left, at = left[written:], at + written
        except OSError as error:
            self._error = error
        return len(data)

    def truncate(self, size: int) -> int:
        try:
            os.ftruncate(self._file, size)
        except OSError as error:
            self._error = self._error or error
        return size

    def flush(self) -> None:
        """Nothing is held back."""

    def check(self) -> None:
        """Raise what went wrong."""
        if self._error is not None:
            raise self._error


@contextlib.contextmanager
def _hdf5(path: Path) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """An HDF5 file that becomes `path`, of a format that does not depend on the library's newest, and its `check`."""
    with replacing(path) as file:
        guarded = _Guarded(file.fileno())
        with h5py.File(guarded, "w", libver=("earliest", "v110")) as h5:
            yield h5, guarded.check
        guarded.check()


def _describe(h5: h5py.File, metadata: Mapping[str, Any]) -> None:
    h5.attrs["mpillm_version"] = __version__
    for key, value in metadata.items():
        simple = isinstance(value, str | int | float | bool)
        h5.attrs[key] = value if simple else msgspec.json.encode(value).decode()


class _Column:
    """A one-dimensional dataset that grows."""

    def __init__(self, group: h5py.Group, name: str, kind: DTypeLike, chunk: int = 1024) -> None:
        self.length = 0
        self._dataset = group.create_dataset(
            name, shape=(0,), maxshape=(None,), dtype=kind, chunks=(chunk,), track_times=False
        )
        self._kind = None if self._dataset.dtype == object else np.dtype(self._dataset.dtype)
        self._pending: list[NDArray[Any]] = []
        self._held = 0

    def add(self, values: ArrayLike) -> None:
        """Append values."""
        array = np.asarray(values, self._kind if self._kind is not None else object)
        self._pending.append(array)
        self._held += len(array)
        self.length += len(array)
        if self._held >= _PENDING:
            self.close()

    def close(self) -> None:
        """Write what is held."""
        if self._held:
            self._dataset.resize((self.length,))
            self._dataset[self.length - self._held :] = np.concatenate(self._pending)
        self._pending, self._held = [], 0


class _Ragged:
    """Rows of different lengths: all values one behind the other, and where each row begins and the last one ends."""

    def __init__(self, group: h5py.Group, values: str, kind: DTypeLike) -> None:
        self._values = _Column(group, values, kind, chunk=8192)
        self._offsets = _Column(group, "offsets", np.int64)
        self._offsets.add([0])
        self._kind = kind

    def add(self, row: bytes | None) -> None:
        """Append a row (None: an empty one)."""
        self._values.add(np.frombuffer(row or b"", self._kind))
        self._offsets.add([self._values.length])

    def close(self) -> None:
        """Write what is held."""
        self._values.close()
        self._offsets.close()


class _Columns:
    """The tables of results.h5."""

    def __init__(self, h5: h5py.File) -> None:
        text = h5py.string_dtype()
        requests, choices = h5.create_group("requests"), h5.create_group("choices")
        self._custom_id = _Column(requests, "custom_id", text)
        self._line = _Column(requests, "line", np.int64)
        self._status = _Column(requests, "status", np.int32)
        self._choices = _Column(requests, "choices", np.int64)
        self._choices.add([0])
        self._prompt = _Column(choices, "prompt", np.int64)
        self._finish_reason = _Column(choices, "finish_reason", text)
        self._prompts = _Ragged(h5.create_group("prompts"), "ids", _IDS)
        self._rows = {
            column.group: _Ragged(h5.create_group(column.group), column.dataset, column.dtype)
            for column in COLUMNS
        }
        self._first_prompt = 0

    def add(self, line: Line, result: Result | None) -> None:
        """A request; None for one whose line is bad."""
        self._custom_id.add([hdf5_text(line.custom_id)])
        self._line.add([line.number])
        self._status.add([400 if result is None else result.status])
        if result is not None and result.choices:
            self._add_choices(result)
        self._choices.add([self._prompt.length])

    def _add_choices(self, result: Result) -> None:
        for row in result.prompts:
            self._prompts.add(row)
        n = len(result.choices) // len(result.prompts)
        for index, choice in enumerate(result.choices):
            self._prompt.add([self._first_prompt + index // n])
            self._finish_reason.add([choice.finish_reason])
            for group, rows in self._rows.items():
                rows.add(choice.values.get(group))
        self._first_prompt += len(result.prompts)

    def close(self) -> None:
        """Write what is held."""
        for column in self._all():
            column.close()

    def _all(self) -> Iterator[_Column | _Ragged]:
        yield from (part for part in vars(self).values() if isinstance(part, _Column | _Ragged))
        yield from self._rows.values()
