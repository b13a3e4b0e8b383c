"""The input: every line is checked before anything loads, then turned into the engine's requests one by one.

A bad line is one error result and costs no other line. Lines stay on disk, and so does what is known of each (where it
is, its name, what is wrong with it): an input of millions of lines costs a few bytes a line of memory.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from mpillm.batch import bodies
from mpillm.batch.lines import Lines
from mpillm.batch.names import NumbersByName
from mpillm.batch.order import Order
from mpillm.batch.rows.json_array import begins_array
from mpillm.batch.rows.line import MAX_LINE, ROW_ERROR
from mpillm.batch.template import asker
from mpillm.batch.work import Line, Model, Work, work_of
from mpillm.errors import JobError, RequestError, UnsuitedError
from mpillm.foreign import alike, binary, what_it_is
from mpillm.spec import Spec

MAX_ERROR = 400  # characters of what is wrong with a line
MAX_MODELS = 16  # names of models that are told apart
PROGRESS_LINES = 256
LOOK = 1 << 16  # bytes at the beginning of an input that tell what it is


@dataclass
class CheckedInput:
    """The checked input."""

    path: Path
    spec: Spec
    model: Model
    lines: Lines = field(default_factory=Lines)
    digest: str = ""  # a hash of all lines
    bad: int = 0  # lines that are wrong
    unsuited: str | None = None  # what the model lacks for the first line that asks for what it cannot do
    models: dict[str, int] = field(default_factory=dict)  # model names that lines carry: how many lines
    order: Order = field(default_factory=Order)  # the order in which the lines are computed
    unit: str = "Line"  # what messages call a line
    url: str | None = None  # the endpoint that all lines must have

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def errors(self) -> Iterator[Line]:
        """The bad lines."""
        return (line for line in self.lines if line.error is not None) if self.bad else iter(())

    def keep_answered(self, done: Container[str]) -> None:
        """A line whose custom_id is in `done` has no error, because an earlier run has answered it.

        That run may have had more memory, or other lines beside it.
        """
        for index in range(len(self)) if self.bad else ():
            line = self.lines[index]
            if line.error is not None and line.custom_id in done:
                self.lines.replace(index, replace(line, error=None, param=None))
                self.bad -= 1

    def unanswered(self, done: Container[str] = ()) -> Iterator[Line]:
        """Return the good lines without the custom_ids in `done`, in the order in which they are best computed."""
        return self._without(done, self.order.indices())

    def works(self, done: Container[str] = ()) -> Iterator[Work]:
        """Return the good lines' work in input order, read again line by line, without the custom_ids in `done`."""
        return self._works(self._without(done, range(len(self))))

    def ordered_works(self, done: Container[str] = ()) -> Iterator[Work]:
        """Yield the work of all lines in the order in which it is best computed."""
        return self._works(self.unanswered(done))

    def _works(self, lines: Iterable[Line]) -> Iterator[Work]:
        with opened(self.path) as file:
            for line in lines:
                yield self._work(file, line)

    def _without(self, done: Container[str], indices: Iterable[int]) -> Iterator[Line]:
        lines = map(self.lines.__getitem__, indices)
        return (line for line in lines if line.error is None and line.custom_id not in done)

    def work(self, line: Line) -> Work:
        """Return one good line's work."""
        with opened(self.path) as file:
            return self._work(file, line)

    def content(self, line: Line) -> bytes:
        """Return the bytes of a line."""
        with opened(self.path) as file:
            return self._content(file, line)

    def _work(self, file: BinaryIO, line: Line) -> Work:
        return make_work(line, read_line(self._content(file, line), self.spec), self.spec, self.model)

    def _content(self, file: BinaryIO, line: Line) -> bytes:
        file.seek(line.offset)
        raw = file.read(line.length)
        if line_digest(raw) != line.digest:
            raise JobError(f"The input {self.path} changed while it was in use (line {line.number}).")
        return raw


def check(
    path: Path,
    spec: Spec,
    model: Model,
    progress: Callable[[int], None] | None = None,
    unit: str = "Line",
    open_file: Callable[[], int] | None = None,
    url: str | None = None,
) -> CheckedInput:
    """Read and check every line; JobError if the input as a whole cannot be used.

    `progress` is told the bytes read so far, now and then. `unit` is what messages call a line. `open_file` makes the
    file of `Lines`. A line for another endpoint than that of `url` is wrong.
    """
    order = Order(model.cached_tokens)
    batch = CheckedInput(path, spec, model, Lines(open_file), unit=unit, order=order, url=url)
    named = NumbersByName()  # for each custom_id, the number of the first line that has it
    seen = hashlib.blake2b(digest_size=16)
    unnamed = 0
    with opened(path) as file:
        for number, offset, raw in raw_lines(file, spec.input):
            content = raw or b""
            line = Line(number, offset, len(content), f"request-{number}", line_digest(content))
            seen.update(line.digest)
            checked = _check_line(line, raw, named, batch)
            unnamed += checked.custom_id is line.custom_id
            batch.lines.append(checked)
            batch.bad += checked.error is not None
            if progress is not None and len(batch) % PROGRESS_LINES == 0:
                progress(offset + len(content))
    if not batch.lines:
        raise JobError(f"The input {spec.input} contains no requests.")
    if batch.bad == len(batch) and batch.unsuited is not None:
        raise JobError(f"{model.name} can answer no request of {spec.input}; {batch.unsuited}.")
    batch.digest = seen.hexdigest()
    for index, line in enumerate(batch.lines) if unnamed else ():
        name = f"request-{line.number}"
        if line.custom_id == name and named.add(name, line.number) != line.number:  # another line's own name
            batch.lines.replace(index, replace(line, custom_id=_free_name(name, named, line.number)))
    return batch


def read_line(raw: bytes, spec: Spec) -> dict[str, Any]:
    """Return the request of a line, or what the job asks of the row that it holds; RequestError if there is none."""
    row = bodies.decode_line(raw)
    if ROW_ERROR in row:
        raise RequestError(str(row[ROW_ERROR]))
    asked = asker(spec)
    return row if asked is None else asked(row)


def make_work(line: Line, content: dict[str, Any], spec: Spec, model: Model) -> Work:
    """Return the work of a line that holds the object `content`; RequestError if it asks for nothing possible."""
    return work_of(line, bodies.read_body(content), spec, model)


def _check_line(line: Line, raw: bytes | None, named: NumbersByName, batch: CheckedInput) -> Line:
    """Return the line with its own name, and with what is wrong with it; counts what is right into `batch`."""
    try:
        if raw is None:
            raise RequestError(f"the line is longer than {MAX_LINE >> 20} MiB")
        bodies.refuse_repeated_keys(raw)
        content = read_line(raw, batch.spec)
        name = bodies.custom_id_of(content)
        if name is not None:
            if (first := named.add(name, line.number)) != line.number:
                raise RequestError(
                    f"the custom_id {name[:100]!r} is already that of {batch.unit.lower()} {first}",
                    "custom_id",
                )
            line = replace(line, custom_id=name)
        work = make_work(line, content, batch.spec, batch.model)
        if batch.url not in (None, work.endpoint.url):
            raise RequestError(
                f"the line is for {work.endpoint.url}, and the batch is for the endpoint {batch.url}", "url"
            )
    except RequestError as problem:
        said = str(problem).rstrip(".")
        said = said if len(said) <= MAX_ERROR else f"{said[:MAX_ERROR]}..."
        batch.order.add(None)
        if isinstance(problem, UnsuitedError) and batch.unsuited is None:
            batch.unsuited = f"{batch.unit.lower()} {line.number}: {said}"
        return replace(line, error=f"{batch.unit} {line.number}: {said}.", param=problem.param)
    batch.order.add(work)
    if (model := work.endpoint.model) is not None:
        name = model[:100]
        if name not in batch.models and len(batch.models) >= MAX_MODELS:
            name = "(another one)"
        batch.models[name] = batch.models.get(name, 0) + 1
    return line


def _free_name(name: str, taken: NumbersByName, number: int) -> str:
    """`name` with the first number behind it that no line has taken; line `number` takes it."""
    return next(free for k in itertools.count(2) if taken.add(free := f"{name}-{k}", number) == number)


def line_digest(raw: bytes) -> bytes:
    """Return a hash of a line's content, 16 bytes."""
    return hashlib.blake2b(raw, digest_size=16).digest()


def opened(path: Path) -> BinaryIO:
    """Return an input to read; JobError if it cannot be."""
    try:
        if not path.exists():
            meant = alike(path)
            raise JobError(f"The input {path} does not exist{f'; {meant}' if meant else '.'}")
        if not path.is_file():
            raise JobError(f"The input {path} is not a file; give a file of requests, such as JSON lines.")
        return path.open("rb")
    except OSError as error:
        raise JobError(f"The input {path} cannot be read: {error.strerror}.") from None


def raw_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, int, bytes | None]]:
    """Number, offset and content of each line that is not blank; None for one that is too long to be held.

    JobError, which calls the input `name`, if the file has no lines of JSON.
    """
    _, array = begins_array(file)
    file.seek(0)
    head = file.read(LOOK)
    if (what := what_it_is(head) or binary(head) or _not_lines(head, bool(array))) is not None:
        raise JobError(f"The input {name} {what}.")
    offset = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    file.seek(offset)
    for number in itertools.count(1):
        raw = file.readline(MAX_LINE + 1)
        if not raw:
            return
        length = len(raw)
        too_long = length > MAX_LINE
        while too_long and not raw.endswith(b"\n") and (raw := file.readline(MAX_LINE)):
            length += len(raw)
        if too_long or raw.strip():
            yield number, offset, None if too_long else raw.rstrip()
        offset += length


def _not_lines(head: bytes, array: bool) -> str | None:
    """Return the message about an input that does not have an object in each line, from its beginning."""
    first, _, rest = head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    first, rest = first.strip(), rest.lstrip()
    if not rest and first.partition(b"\r")[0].rstrip().endswith(b"}") and b"\r" in first:
        return "has lines that end in carriage returns only; convert them to newlines: tr '\\r' '\\n'"
    if array:
        return "is a JSON array; write one object per line: jq -c '.[]'"
    if first == b"{" and rest.startswith((b'"', b"}")):
        return "has objects that span several lines; write one object per line: jq -c '.'"
    if b"{" in head or first[:1] in b'["':  # nothing, or JSON of other kinds
        return None
    for separator, suffix in ((b"\t", ".tsv"), (b",", ".csv"), (b";", ".csv")):
        if 0 < first.count(separator) == rest.partition(b"\n")[0].count(separator):
            return f"has no objects in its lines; if it is a table, give it a name that ends in {suffix}"
    return "has texts in its lines, and no objects; make objects of them: jq -cR '{prompt: .}'"
