"""The results of a run as NumPy arrays, as rows, and as a frame of pandas or polars."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cached_property
from importlib.util import find_spec
from operator import index
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from mpillm.errors import JobError
from mpillm.store.hdf5 import existing_file
from mpillm.store.output import refuse_no_directory
from mpillm.store.results import HDF5, JSONL
from mpillm.store.table import as_cell, row_of
from mpillm.words import count_of


class Ragged:
    """Rows of different lengths, stored one after the other in one array."""

    def __init__(self, values: NDArray[Any], offsets: NDArray[np.int64]) -> None:
        self.values = values  #: all rows, [offsets[-1]]
        self.offsets = offsets  #: where each row begins, and the last one ends, [rows + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[Any]:
        row = range(len(self))[index(row)]
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __repr__(self) -> str:
        """Return the sizes, as a notebook shows them."""
        return f"<Ragged: {count_of(len(self), 'row')}, {count_of(len(self.values), 'value')} ({self.values.dtype})>"


class Results:
    """A finished run's output directory.

    Requests are in the input's order. The choices of request `i` are the rows `choices[i]` to `choices[i + 1]` of
    `tokens`, `logprobs`, `prompt_logprobs`, `embeddings` and `finish_reasons`.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Open an output directory; raises JobError if it has no results (yet)."""
        self.directory = Path(directory)
        refuse_no_directory(self.directory)
        if not (self.directory / JSONL).is_file() or not (self.directory / HDF5).is_file():
            raise JobError(
                f"There are no results in {self.directory}: its run is not finished, or it is not the output "
                "directory of a run."
            )

    def __len__(self) -> int:
        return len(self.status)

    def __repr__(self) -> str:
        return f"<Results {self.directory}: {count_of(len(self), 'request')}>"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The lines of results.jsonl, one by one."""
        with (self.directory / JSONL).open("rb") as file:
            yield from map(msgspec.json.decode, file)

    @cached_property
    def custom_ids(self) -> NDArray[np.object_]:
        """[requests], str"""
        found: NDArray[np.object_] = np.array(
            [_text(name) for name in self._read("requests/custom_id")], object
        )
        return found

    @cached_property
    def status(self) -> NDArray[np.int32]:
        """[requests]: 200, or that of an error"""
        found: NDArray[np.int32] = self._read("requests/status")
        return found

    @cached_property
    def choices(self) -> NDArray[np.int64]:
        """[requests + 1]: where the choices of each request begin"""
        found: NDArray[np.int64] = self._read("requests/choices")
        return found

    @cached_property
    def finish_reasons(self) -> NDArray[np.object_]:
        """[choices]: "stop" or "length" """
        found: NDArray[np.object_] = np.array(
            [name.decode() for name in self._read("choices/finish_reason")], object
        )
        return found

    @cached_property
    def prompts(self) -> Ragged:
        """Token ids of each prompt; those of choice `j` are row `prompt_of[j]`."""
        return self._ragged("prompts", "ids")

    @cached_property
    def prompt_of(self) -> NDArray[np.int64]:
        """[choices]: the row of `prompts`"""
        found: NDArray[np.int64] = self._read("choices/prompt")
        return found

    @cached_property
    def tokens(self) -> Ragged:
        """Generated token ids of each choice."""
        return self._ragged("tokens", "ids")

    @cached_property
    def logprobs(self) -> Ragged:
        """Natural log-probabilities of the generated tokens, if requested."""
        return self._ragged("logprobs", "values")

    @cached_property
    def prompt_logprobs(self) -> Ragged:
        """Natural log-probabilities of the tokens of each prompt from the second one on, if requested."""
        return self._ragged("prompt_logprobs", "values")

    @cached_property
    def embeddings(self) -> Ragged:
        """The vector of each input, as in the answer."""
        return self._ragged("embeddings", "values")

    @cached_property
    def loglikelihoods(self) -> Ragged:
        """The log-likelihood of each choice of a multiple choice."""
        return self._ragged("loglikelihoods", "values")

    @cached_property
    def probabilities(self) -> Ragged:
        """A classifier's probability of each label, for each input."""
        return self._ragged("probabilities", "values")

    @cached_property
    def relevance(self) -> Ragged:
        """The answer of a classifier for each pair of a query and a document."""
        return self._ragged("relevance", "values")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield a row for each request, one by one, with the columns of `mpillm.store.table.row_of`: custom_id, status,
        error, text, and so on; None for fields that an answer does not have.
        """
        for line in self:
            yield row_of(line)

    def frame(self, library: Literal["pandas", "polars"] | None = None) -> Any:
        """`rows` as a DataFrame of pandas or polars; by default of the installed one, pandas if both are.

        A `text` that is a choice of token ids is JSON, as in tables. Raises ImportError if neither is installed.
        """
        if library not in (None, "pandas", "polars"):
            raise ValueError(f"frame makes frames of pandas or polars, not of {library!r}")
        name = library or next((name for name in ("pandas", "polars") if find_spec(name)), None)
        if name is None:
            raise ImportError("A frame needs pandas or polars: pip install pandas.")
        rows = list(self.rows())
        for row in rows:
            if row["text"] is not None:
                row["text"] = as_cell(row["text"])
        if name == "pandas":
            import pandas

            return pandas.DataFrame.from_records(rows)
        import polars

        return polars.DataFrame(rows, infer_schema_length=None)

    def _read(self, name: str) -> Any:
        with existing_file(self.directory / HDF5) as file:
            return file[name][:]

    def _ragged(self, group: str, values: str) -> Ragged:
        return Ragged(self._read(f"{group}/{values}"), self._read(f"{group}/offsets"))


def read_results(directory: str | os.PathLike[str]) -> Results:
    """Return the results of a finished run; raises JobError if `directory` has none."""
    return Results(directory)


def _text(stored: bytes) -> str:
    """Return a string of results.h5 (see `hdf5_text`)."""
    text = stored.decode()
    return json.loads(text) if text.startswith('"') else text
