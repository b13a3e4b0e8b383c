"""The lines of a job's input: the input itself, or lines made from an input in another format.

The lines made lie in the output directory beside the journal. Each run makes them anew; the same input gives the same.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from mpillm.batch import requests
from mpillm.batch.bodies import LINE_KEYS
from mpillm.batch.endpoints import ENDPOINTS
from mpillm.batch.rows import forms
from mpillm.batch.rows.compressed import STDIN
from mpillm.batch.template import Template, is_index
from mpillm.comm import launch
from mpillm.errors import JobError
from mpillm.spec import Spec
from mpillm.store import table
from mpillm.store.output import INPUT, Claim


def lines_path(spec: Spec) -> Path:
    """Return the path of the lines, once the input is prepared."""
    return spec.input_path if forms.is_lines(spec.input_path) else spec.output_path / INPUT


def prepare(spec: Spec, claim: Claim) -> None:
    """Make lines if the input has another format; JobError if it cannot be read, or if no table can be written."""
    if spec.output.format != "none":
        table.check_library(spec.output.format)
    path = spec.input_path
    if forms.is_lines(path):
        return
    if str(path) == STDIN and launch.launched_by(os.environ) is not None:
        raise JobError(
            "Standard input works only without mpiexec, which does not pass on its end; write the input to a "
            "file first."
        )
    with claim.directory.replacing(INPUT) as file:
        forms.write_lines(path, file, partial(_check_columns, spec), claim.directory.unnamed)


@contextmanager
def opened(spec: Spec) -> Iterator[IO[bytes]]:
    """The lines, also before `prepare`; none of standard input, which can be read only once."""
    path = lines_path(spec)
    if path.exists():
        with requests.opened(path) as file:
            yield file
        return
    with tempfile.TemporaryFile() as made:
        if str(spec.input_path) != STDIN and spec.input_path.exists():
            forms.write_lines(spec.input_path, made, partial(_check_columns, spec))
            made.seek(0)
        yield made


def _check_columns(spec: Spec, columns: list[str]) -> None:
    """Raise JobError if a table lacks what is asked of its rows."""
    has = ", ".join(map(repr, columns))
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise JobError(f"The input {spec.input} has two columns {twice!r}; rename one of them.")
    if spec.request is not None:
        if missing := Template(spec.request).missing(columns):
            raise JobError(
                f"The input {spec.input} has no column {missing[0]!r}, which the job's request names; it has {has}."
            )
        return
    if not columns:
        raise JobError(f"The input {spec.input} has no columns; give a table of requests.")
    say = 'say in the job what to ask of a row, such as prompt = "Summarise: {text}".'
    if not {"body", *(endpoint.key for endpoint in ENDPOINTS)} & set(columns):
        raise JobError(
            f"The input {spec.input} has the columns {has}, none of which is a key of a request; {say}"
        )
    other = next((name for name in columns if not is_index(name) and name not in LINE_KEYS), None)
    if other is not None:
        raise JobError(
            f"The input {spec.input} has a column {other!r}, which is not a key of a request; {say}"
        )
