"""The results, made from the input's lines and the journal: results.jsonl and results.h5.

results.jsonl and results.h5 are the same bytes for the same job, however often it was stopped. What differs from run
to run stays out of them: the timings lie in timings.h5, which results.h5 links to as its group /timings, and the
layout, hosts and rates in report.json.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from mpillm.batch.answers import bad_line, check_finite, error_line, result_line
from mpillm.batch.endpoints import COLUMNS
from mpillm.batch.work import Line, Model, Work
from mpillm.engine.request import FinishedCompletion
from mpillm.errors import NotFiniteError
from mpillm.store.directory import SYNC_BYTES, Directory
from mpillm.store.hdf5 import GrowingDataset, RaggedColumn, TextColumn, new_file
from mpillm.store.journal import Journal
from mpillm.store.records import Choice, Result, line_key
from mpillm.version import __version__

if TYPE_CHECKING:
    import h5py

JSONL, HDF5, TIMINGS = "results.jsonl", "results.h5", "timings.h5"

_IDS = np.dtype("<i4")


def finished_record(work: Work, completions: Sequence[FinishedCompletion], model: Model) -> Result:
    """Return the journal's record of a request that went well; `completions` in the order of `work.requests`."""
    line = result_line(work, completions, model)
    prompts = [_bytes(prompt, _IDS) for prompt in work.prompts]
    choices = [_choice(work, completion, model) for completion in completions]
    return Result(work.custom_id, line_key(work.line), 200, line, prompts, choices)


def ended(work: Work, completions: Sequence[FinishedCompletion], model: Model) -> Result:
    """Return the journal's record of a request whose choices are computed: an error if one is not finite."""
    try:
        check_finite(completions)
        return finished_record(work, completions, model)
    except NotFiniteError as error:  # what an endpoint makes of a pooled vector may overflow, too
        return failed_record(work, str(error), status=500)


def failed_record(work: Work, message: str, status: int = 400) -> Result:
    """Return the journal's record of a request that ended in an error."""
    return Result(work.custom_id, line_key(work.line), status, error_line(work.custom_id, message, status))


def _choice(work: Work, completion: FinishedCompletion, model: Model) -> Choice:
    values = work.endpoint.values(work, completion, model)
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


def write_jsonl(directory: Directory, lines: Iterable[Line], journal: Journal) -> int:
    """Write results.jsonl: every line of the input once, in its order; return how many ended in an error."""
    errors = unsynced = 0
    with directory.replacing(JSONL) as file:
        for line in lines:
            if line.error is not None:
                errors += 1
                written = bad_line(line)
            else:
                result = journal.read(line.custom_id)
                errors += result.status != 200
                written = result.line
            file.write(written + b"\n")
            unsynced += len(written)
            if unsynced >= SYNC_BYTES:
                file.flush()
                os.fdatasync(file.fileno())
                unsynced = 0
    return errors


def write_hdf5(
    directory: Directory, lines: Iterable[Line], journal: Journal, metadata: Mapping[str, Any]
) -> None:
    """Write results.h5 and timings.h5.

    `metadata` (what the results depend on: model, sampling, wire, ...) becomes attributes of the root. Groups:

    requests: custom_id (see `hdf5_text`), line (from 1), status, and choices [n + 1]: request i has choices[i] up to
    choices[i + 1].
    choices: prompt (index into /prompts), finish_reason.
    prompts, tokens: ids (int32) with offsets [.. + 1]; logprobs, prompt_logprobs, embeddings: values (float32)
    with offsets. An answer without them has none; prompt_logprobs begin at the prompt's second token; embeddings
    are those of the answers.
    """
    import h5py

    with (
        new_file(directory, HDF5) as (h5, check),
        new_file(directory, TIMINGS) as (timings_h5, check_timings),
    ):
        _describe(h5, metadata)
        h5["timings"] = h5py.ExternalLink(TIMINGS, "/")
        columns = _ResultColumns(h5)
        waiting = GrowingDataset(timings_h5, "seconds_waiting", np.float64)
        running = GrowingDataset(timings_h5, "seconds_running", np.float64)
        for line in lines:
            result = None if line.error is not None else journal.read(line.custom_id)
            columns.add(line, result)
            check()
            check_timings()
            for choice in result.choices if result else ():
                waiting.add(choice.seconds_waiting)
                running.add(choice.seconds_running)
        for column in (waiting, running, columns):
            column.flush()


def hdf5_text(text: str) -> str:
    """Return a string as results.h5 stores it: a JSON string if it has a zero character, which HDF5 cannot store.

    A string that begins with a double quote becomes a JSON string too, so that a reader can tell the two apart.
    """
    if "\0" in text or text.startswith('"'):
        return msgspec.json.encode(text).decode()
    return text


def _describe(h5: h5py.File, metadata: Mapping[str, Any]) -> None:
    h5.attrs["mpillm_version"] = __version__
    for key, value in metadata.items():
        simple = isinstance(value, str | int | float | bool)
        h5.attrs[key] = value if simple else msgspec.json.encode(value).decode()


class _ResultColumns:
    """The tables of results.h5."""

    def __init__(self, h5: h5py.File) -> None:
        requests, choices = h5.create_group("requests"), h5.create_group("choices")
        self._custom_id = TextColumn(requests, "custom_id")
        self._line = GrowingDataset(requests, "line", np.int64)
        self._status = GrowingDataset(requests, "status", np.int32)
        self._choices = GrowingDataset(requests, "choices", np.int64)
        self._choices.add(0)
        self._prompt = GrowingDataset(choices, "prompt", np.int64)
        self._finish_reason = TextColumn(choices, "finish_reason")
        self._prompts = RaggedColumn(h5.create_group("prompts"), "ids", _IDS)
        self._rows = {
            column.group: RaggedColumn(h5.create_group(column.group), column.dataset, column.dtype)
            for column in COLUMNS
        }
        self._first_prompt = 0

    def add(self, line: Line, result: Result | None) -> None:
        """Add a request; None for a bad line."""
        self._custom_id.add(hdf5_text(line.custom_id))
        self._line.add(line.number)
        self._status.add(400 if result is None else result.status)
        if result is not None and result.choices:
            self._add_choices(result)
        self._choices.add(len(self._prompt))

    def _add_choices(self, result: Result) -> None:
        for row in result.prompts:
            self._prompts.add(row)
        n = len(result.choices) // len(result.prompts)
        for index, choice in enumerate(result.choices):
            self._prompt.add(self._first_prompt + index // n)
            self._finish_reason.add(sys.intern(choice.finish_reason))  # there are three
            for group, rows in self._rows.items():
                rows.add(choice.values.get(group, b""))
        self._first_prompt += len(result.prompts)

    def flush(self) -> None:
        """Write the buffered values."""
        for column in vars(self).values():
            if isinstance(column, GrowingDataset | TextColumn | RaggedColumn):
                column.flush()
        for rows in self._rows.values():
            rows.flush()
