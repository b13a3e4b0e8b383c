"""OpenAI's files and batches: an uploaded file becomes a job beside the clients' requests, and survives a restart.

`files/` in the server's directory has a file and its description for each upload; `batches/` has a description and an
output directory, as `mpillm run` leaves it, for each batch. A batch goes on from its journal.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from mpillm.batch import requests
from mpillm.batch.answers import bad_line
from mpillm.batch.work import Model, Work
from mpillm.engine.sequence import FinishedCompletion
from mpillm.errors import MpillmError
from mpillm.serve.arrivals import Arrivals, Ticket
from mpillm.spec import Spec
from mpillm.store import results
from mpillm.store.directory import replacing
from mpillm.store.journal import Journal
from mpillm.store.output import Claim

ENDED = ("completed", "failed", "cancelled")
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


class RequestCounts(msgspec.Struct, kw_only=True):
    """Lines of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchObject(msgspec.Struct, kw_only=True):
    """A batch as OpenAI describes it; times are seconds since 1970."""

    id: str
    object: str = "batch"
    endpoint: str
    input_file_id: str
    completion_window: str = "24h"
    status: str = "validating"
    errors: dict[str, Any] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    expires_at: int | None = None
    expired_at: int | None = None
    request_counts: RequestCounts = msgspec.field(default_factory=RequestCounts)
    metadata: dict[str, str] | None = None


class _Described:
    """Descriptions in a directory, one JSON file each."""

    def __init__(self, folder: Path, kind: type[File] | type[BatchObject]) -> None:
        self.folder, self._kind = folder, kind
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where the content of `name` is; KeyError if that is no id."""
        if not _ID.fullmatch(name):
            raise KeyError(name)
        return self.folder / name

    def read(self, name: str) -> Any:
        """The description of `name`; KeyError if there is none."""
        try:
            return msgspec.json.decode(self.path(name).with_suffix(".json").read_bytes(), type=self._kind)
        except FileNotFoundError:
            raise KeyError(name) from None

    def write(self, described: File | BatchObject) -> None:
        """Keep a description, in place of an earlier one."""
        with replacing(self.path(described.id).with_suffix(".json")) as file:
            file.write(msgspec.json.encode(described))

    def all(self) -> list[Any]:
        """All descriptions, the newest first."""
        found = [self.read(path.stem) for path in self.folder.glob("*.json") if _ID.fullmatch(path.stem)]
        return sorted(found, key=lambda each: (-each.created_at, each.id))


class FileStore:
    """The uploaded files, and the results of batches."""

    def __init__(self, folder: Path) -> None:
        self._described = _Described(folder, File)
        self.read, self.all = self._described.read, self._described.all

    def add(self, name: str, purpose: str, source: BinaryIO) -> File:
        """Keep the content of a file."""
        made = File(
            id=f"file-{uuid.uuid4().hex[:24]}",
            bytes=0,
            created_at=int(time.time()),
            filename=name[:255] or "file",
            purpose=purpose,
        )
        with replacing(self._described.path(made.id)) as file:
            while piece := source.read(_COPY):
                made.bytes += file.write(piece)
        self._described.write(made)
        return made

    def content(self, name: str) -> Path:
        """Where a file's content is; KeyError if there is no such file."""
        self.read(name)
        return self._described.path(name)

    def delete(self, name: str) -> None:
        """Forget a file."""
        path = self.content(name)
        path.with_suffix(".json").unlink()
        path.unlink(missing_ok=True)


class Batches:
    """All batches: those that run, and those that have ended."""

    def __init__(
        self,
        folder: Path,
        files: FileStore,
        arrivals: Arrivals,
        spec: Spec,
        model: Model,
        open_journal: Callable[[requests.CheckedInput, Claim], Journal],
    ) -> None:
        """`open_journal` opens the journal of a batch in its claimed directory."""
        self._described = _Described(folder, BatchObject)
        self.read, self.all = self._described.read, self._described.all
        self._files, self._arrivals, self._spec, self._model = files, arrivals, spec, model
        self._open_journal = open_journal
        self._running: dict[str, _Run] = {}
        self._changed = threading.RLock()
        # Inputs are checked, and results written, one after the other.
        self._pool = ThreadPoolExecutor(1, "batches")
        for batch in reversed(self.all()):
            if batch.status not in ENDED:
                self._pool.submit(self._begin, batch)

    def add(self, input_file_id: str, endpoint: str, metadata: dict[str, str] | None) -> BatchObject:
        """Begin a batch; KeyError if there is no such file."""
        self._files.content(input_file_id)
        made = BatchObject(
            id=f"batch-{uuid.uuid4().hex[:24]}",
            endpoint=endpoint,
            input_file_id=input_file_id,
            created_at=int(time.time()),
            metadata=metadata,
        )
        self._described.write(made)
        self._pool.submit(self._begin, made)
        return made

    def now(self, batch: BatchObject) -> BatchObject:
        """The batch with what is finished of it by now."""
        run = self._running.get(batch.id)
        return batch if run is None else msgspec.structs.replace(batch, request_counts=run.counts())

    def cancel(self, name: str) -> BatchObject:
        """End a batch before its time; KeyError if there is none."""
        with self._changed:
            batch: BatchObject = self.read(name)
            if batch.status in ENDED:
                return batch
            self._set(batch, "cancelling")
            run = self._running.get(name)
            if run is not None:
                run.cancel()
            return batch

    def commit(self) -> None:
        """Bring what is finished to disk; the engine's thread calls it after every step."""
        with self._changed:
            for run in self._running.values():
                run.commit()

    def close(self) -> None:
        """Stop where everything is; the next start goes on from there."""
        self._pool.shutdown(cancel_futures=True)
        for run in list(self._running.values()):
            run.close()

    def _set(self, batch: BatchObject, status: str, **changes: Any) -> None:
        batch.status = status
        setattr(batch, f"{status}_at", int(time.time()))
        for key, value in changes.items():
            setattr(batch, key, value)
        self._described.write(batch)

    def _begin(self, batch: BatchObject) -> None:
        try:
            path = self._files.content(batch.input_file_id)
            checked = requests.check(path, self._spec, self._model)
            run = _Run(checked, Claim(self._described.path(batch.id)), self._open_journal, self._model)
        except (MpillmError, KeyError) as error:
            message = "The input file is gone." if isinstance(error, KeyError) else str(error)
            with self._changed:
                self._set(batch, "failed", errors={"object": "list", "data": [{"message": message}]})
            return
        with self._changed:
            if self.read(batch.id).status == "cancelling":
                run.cancel()
            else:
                self._set(batch, "in_progress")
            self._running[batch.id] = run
        self._arrivals.add_background(run.tickets(lambda: self._pool.submit(self._end, batch.id)))

    def _end(self, name: str) -> None:
        with self._changed:
            batch, run = self.read(name), self._running[name]
            batch.request_counts = run.counts()
            if not run.cancelled:
                self._set(batch, "finalizing")
        answered, failed = run.write()
        with self._changed:
            for key, path in (("output_file_id", answered), ("error_file_id", failed)):
                if path.stat().st_size:
                    with open(path, "rb") as file:
                        made = self._files.add(f"{name}_{path.name}", "batch_output", file)
                    setattr(batch, key, made.id)
                path.unlink()
            self._set(batch, "cancelled" if run.cancelled else "completed")
            del self._running[name]
        run.close()


class _Run:
    """A batch that is computed. `tickets` and `commit` are for the engine's thread."""

    def __init__(
        self,
        batch: requests.CheckedInput,
        claim: Claim,
        open_journal: Callable[[requests.CheckedInput, Claim], Journal],
        model: Model,
    ) -> None:
        self._batch, self._claim, self._model = batch, claim, model
        self.cancelled = False
        self._under_way: set[str] = set()
        self._all_taken = False
        with contextlib.ExitStack() as unless_made:
            unless_made.callback(claim.close)
            self._journal = open_journal(batch, claim)
            unless_made.pop_all()
        batch.keep_answered(self._journal.done)

    def counts(self) -> RequestCounts:
        """How far it is."""
        bad, done = self._batch.bad, len(self._journal.done)
        failed = bad + self._journal.done.failed
        return RequestCounts(total=len(self._batch), completed=bad + done - failed, failed=failed)

    def tickets(self, ended: Callable[[], object]) -> Iterator[Ticket]:
        """A ticket for each line that is not answered; `ended` is called once all are."""
        self._ended = ended
        for work in self._batch.ordered_works(done=self._journal.done):
            if self.cancelled:
                break
            ticket = Ticket(work, partial(self._take, work))
            self._under_way.add(work.custom_id)
            yield ticket
        self._all_taken = True
        self._look_for_end()

    def _take(self, work: Work, completions: list[FinishedCompletion] | None) -> None:
        self._under_way.remove(work.custom_id)
        if completions is None:  # the server ends
            return
        self._journal.append(results.ended(work, completions, self._model))
        self._look_for_end()

    def _look_for_end(self) -> None:
        if self._all_taken and not self._under_way:
            self._journal.flush()
            self._all_taken = False
            self._ended()

    def cancel(self) -> None:
        """Take no more lines; those that run are finished."""
        self.cancelled = True

    def commit(self) -> None:
        """Bring what is finished to disk, if it is time."""
        self._journal.commit()

    def write(self) -> tuple[Path, Path]:
        """Write the results; the files of those that were answered, and of the others."""
        folder, journal = self._claim.path, self._journal
        answered, failed = folder / "output.jsonl", folder / "errors.jsonl"
        with replacing(answered) as good, replacing(failed) as bad:
            for line in self._batch.lines:
                if line.error is not None:
                    bad.write(bad_line(line) + b"\n")
                elif line.custom_id in journal.done:
                    result = journal.read(line.custom_id)
                    (good if result.status == 200 else bad).write(result.line + b"\n")
        return answered, failed

    def close(self) -> None:
        """Close its files."""
        self._journal.flush()
        self._journal.close()
        self._claim.close()
