"""The table of a finished run: each row of the input with its answer, as CSV, Parquet or JSON lines.

The input and results.jsonl are read twice, side by side: first for the columns and their types, then for the rows. So
nothing is held but the names of the columns and the rows that are written at once.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from mpillm.batch.bodies import decode_line
from mpillm.batch.requests import line_digest, opened, raw_lines
from mpillm.batch.rows.line import ROW_ERROR
from mpillm.errors import JobError, RequestError
from mpillm.foreign import alike
from mpillm.spec import TableFormat
from mpillm.store import report
from mpillm.store.directory import Directory, replacing
from mpillm.store.output import INPUT
from mpillm.store.readable import path_of
from mpillm.store.results import JSONL

Row = dict[str, Any]

MAX_COLUMNS = 10_000
# Rows and bytes of results.jsonl that are written at once; the last row may exceed the bytes.
ROWS, BYTES = 4096, 4 << 20
_ALWAYS = ("custom_id", "status", "error")  # columns that a table has, also where all are null
# Columns of lists of numbers.
_LISTS = {
    "embedding": "float32",
    "scores": "float64",
    "probabilities": "float64",
}
_INTEGERS = range(-(2**63), 2**63)


def check_library(format: TableFormat) -> None:
    """Raise JobError if what writes the format is not installed."""
    if format == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401 - whether it is there
        except ImportError:
            raise JobError("A Parquet table needs a library: pip install 'mpillm[tables]'.") from None


def file_name(format: TableFormat) -> str:
    """Return the name of a run's table in its output directory."""
    return f"table.{format}"


def export(run: Path, format: TableFormat, target: Path | None, lines: Path | None) -> Path:
    """Write the table of the finished run in a directory, and return its path.

    It is `target`, by default a file in the directory. `lines` is where the input is now, if it was moved. JobError
    says what is missing, or that the input has changed.
    """
    made = report.read(run)
    check_library(format)
    if lines is not None and not lines.exists():
        raise JobError(
            f"The input {lines} does not exist; {alike(lines) or 'give the file that the run has read.'}"
        )
    if lines is None:
        lines = run / INPUT if (run / INPUT).exists() else path_of(made.input.path) if made.input else None
    if lines is None or not lines.exists():
        where = "is not known, as after a merge" if lines is None else f"is not at {lines} any more"
        raise JobError(f"The input of {run} {where}; give its path: --input FILE.")
    with Directory(run) as directory:
        digest = made.input.digest if made.input else None
        if target is None:
            write(directory, lines, digest, format)
            return run / file_name(format)
        with replacing(target) as file:
            _write(file, format, lambda: _joined(directory, lines, digest))
        return target


def write(directory: Directory, lines: Path, digest: str | None, format: TableFormat) -> None:
    """Write the table into a run's directory; `lines` are those of its input, of which `digest` is known."""
    with directory.replacing(file_name(format)) as file:
        _write(file, format, lambda: _joined(directory, lines, digest))


def row_of(line: Row) -> Row:
    """Return a table's row for a line of results.jsonl, with its first choice or text; what the line lacks is null.

    `custom_id`, `status`, `error`; `text` (of a multiple choice the likeliest), `reasoning`, `tool_calls`,
    `finish_reason`; `logprob`, the sum over a prompt that was scored, or over the likeliest choice; `embedding`;
    `scores` of the documents in the request's order; `label` and `probabilities` of a classifier.
    """
    body, error = line["response"]["body"], line["error"]
    choice: Row = next(iter(body.get("choices") or ()), {})
    message: Row = choice.get("message") or {}
    data = body.get("data") or ()
    first: Row = next(iter(data), {})
    row = {
        "custom_id": line["custom_id"],
        "status": line["response"]["status_code"],
        "error": error["message"] if error else None,
        "text": choice.get("text", message.get("content")),
        "reasoning": message.get("reasoning_content"),
        "tool_calls": message.get("tool_calls"),
        "finish_reason": choice.get("finish_reason"),
        "logprob": _logprob(choice, body),
        "embedding": _vector(first.get("embedding")),
        "scores": [item["score"] for item in data] if "score" in first else _ranked(body.get("results")),
        "label": first.get("label"),
        "probabilities": first.get("probs"),
    }
    if "best" in body:
        best = body["choices"][body["best"]["logprob"]]
        row.update(text=best["text"], logprob=best["logprob"])
    return row


def _logprob(choice: Row, body: Row) -> float | None:
    """Return the sum over a prompt that was scored."""
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
    if logprobs is None or body["usage"].get("completion_tokens"):
        return None
    return float(sum(value for value in logprobs if value is not None))


def _vector(given: list[float] | str | None) -> list[float] | None:
    found: list[float] | None = (
        np.frombuffer(base64.b64decode(given), "<f4").tolist() if isinstance(given, str) else given
    )
    return found


def _ranked(results: list[Row] | None) -> list[float | None] | None:
    """Return the scores of documents in the request's order; null for those that `top_n` left out."""
    if results is None:
        return None
    scores: list[float | None] = [None] * (1 + max(item["index"] for item in results))
    for item in results:
        scores[item["index"]] = item["relevance_score"]
    return scores


def _joined(directory: Directory, lines: Path, digest: str | None) -> Iterator[tuple[Row, Row, int]]:
    """Yield each row of the input, its answer's row, and the bytes of both; JobError if they do not belong together."""
    seen = hashlib.blake2b(digest_size=16)
    changed = JobError(f"The input {lines} has changed since the run; restore it, or run the job again.")
    with opened(lines) as file, open(directory.open(JSONL, os.O_RDONLY), "rb") as answers:
        for line, answer in zip_longest(raw_lines(file, str(lines)), answers):
            if line is None or answer is None:
                raise changed
            raw = line[2] or b""
            seen.update(line_digest(raw))
            yield _columns(raw), row_of(msgspec.json.decode(answer)), len(raw) + len(answer)
    if digest is not None and seen.hexdigest() != digest:
        raise changed


def _columns(raw: bytes) -> Row:
    """Return the columns of a row; empty if the row is no object."""
    try:
        row = decode_line(raw)
    except RequestError:
        return {}
    return {} if ROW_ERROR in row else row


@dataclass
class _TableColumns:
    """The columns of a table, and the kinds of their values other than null."""

    rows: dict[str, set[str]] = field(default_factory=dict)
    answers: dict[str, set[str]] = field(default_factory=dict)
    renames: bool = False  # whether a row's own custom_id is not that of its answer

    def add(self, row: Row, answer: Row) -> None:
        for found, values in ((self.rows, row), (self.answers, answer)):
            for name, value in values.items():
                kinds = found.setdefault(name, set())
                if value is not None:
                    kinds.add(_kind(value))
        self.renames = self.renames or row.get("custom_id", answer["custom_id"]) != answer["custom_id"]
        if len(self.rows) > MAX_COLUMNS:
            raise JobError(
                f"The input's rows have more than {MAX_COLUMNS} different columns; a table cannot have so many."
            )

    def shown(self) -> dict[str, str]:
        """Return the answer's columns that the table has: what `row_of` calls them, and what the table does.

        Where the input has a column of the same name, `answer_` stands before it. A custom_id is one column, unless
        the job gives requests another one than their rows have.
        """
        kept = [name for name, kinds in self.answers.items() if kinds or name in _ALWAYS]
        return {name: name if name == "custom_id" and not self.renames else self._free(name) for name in kept}

    def _free(self, name: str) -> str:
        while name in self.rows:
            name = f"answer_{name}"
        return name


def _kind(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value not in _INTEGERS:
        return "json"
    return {bool: "bool", int: "int", float: "float", str: "str"}.get(type(value), "json")


def _write(file: BinaryIO, format: TableFormat, joined: Callable[[], Iterator[tuple[Row, Row, int]]]) -> None:
    columns = _TableColumns()
    for row, answer, _ in joined():
        columns.add(row, answer)
    shown = columns.shown()
    kinds = columns.rows | {name: columns.answers[own] for own, name in shown.items()}
    lists = {shown[own]: kind for own, kind in _LISTS.items() if own in shown}

    def rows() -> Iterator[tuple[Row, int]]:
        for row, answer, size in joined():
            yield (
                {**dict.fromkeys(columns.rows), **row, **{name: answer[own] for own, name in shown.items()}},
                size,
            )

    _WRITERS[format](file, rows(), kinds, lists)


def _write_csv(
    file: BinaryIO, rows: Iterable[tuple[Row, int]], kinds: dict[str, set[str]], lists: dict[str, str]
) -> None:
    text = io.TextIOWrapper(file, "utf-8", newline="")
    try:
        writer = csv.writer(text)  # as RFC 4180 says
        writer.writerow(kinds)
        for row, _ in rows:
            writer.writerow("" if value is None else as_cell(value) for value in row.values())
    finally:
        text.detach()  # leaves the file open


def _write_jsonl(
    file: BinaryIO, rows: Iterable[tuple[Row, int]], kinds: dict[str, set[str]], lists: dict[str, str]
) -> None:
    for row, _ in rows:
        file.write(msgspec.json.encode(row) + b"\n")


def _write_parquet(
    file: BinaryIO, rows: Iterable[tuple[Row, int]], kinds: dict[str, set[str]], lists: dict[str, str]
) -> None:
    import pyarrow
    from pyarrow import parquet

    types = {
        name: pyarrow.list_(pyarrow.type_for_alias(lists[name])) if name in lists else _arrow_type(found)
        for name, found in kinds.items()
    }
    texts = [name for name, kind in types.items() if kind == pyarrow.string()]
    schema = pyarrow.schema(types.items())
    held: list[Row] = []
    size = 0
    with parquet.ParquetWriter(file, schema) as writer:
        for row, nbytes in rows:
            for name in texts:
                if row[name] is not None:
                    row[name] = as_cell(row[name])
            held.append(row)
            size += nbytes
            if len(held) >= ROWS or size >= BYTES:
                writer.write_batch(pyarrow.RecordBatch.from_pylist(held, schema))
                held, size = [], 0
        if held:
            writer.write_batch(pyarrow.RecordBatch.from_pylist(held, schema))


def _arrow_type(kinds: set[str]) -> Any:
    """Return the type of a column with values of these kinds: a text (of JSON) where no other holds all of them."""
    import pyarrow

    if kinds == {"bool"}:
        return pyarrow.bool_()
    if kinds == {"int"}:
        return pyarrow.int64()
    if kinds and kinds <= {"int", "float"}:
        return pyarrow.float64()
    return pyarrow.string()


def as_cell(value: Any) -> str:
    """Return a string as it is, any other value as JSON."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


_WRITERS = {"csv": _write_csv, "parquet": _write_parquet, "jsonl": _write_jsonl}
