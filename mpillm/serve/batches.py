"""OpenAI's batches: an uploaded file becomes a job beside the clients' requests, and survives a restart.

`files/` in the server's directory has a file and its description for each upload; `batches/` has a description and an
output directory, as `mpillm run` leaves it, for each batch. A batch goes on from its journal.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from mpillm.batch import requests
from mpillm.batch.answers import BAD, FAILED
from mpillm.batch.work import Model
from mpillm.errors import JobError, MpillmError, NoSpace
from mpillm.serve.arrivals import Arrivals
from mpillm.serve.batch_run import RETRY, BatchRun, RequestCounts, counts_on_disk
from mpillm.serve.files import Descriptions, FileStore, new_digits
from mpillm.spec import Spec
from mpillm.store.journal import Journal
from mpillm.store.output import Claim

log = logging.getLogger(__name__)

FULL_DISK = "The server's disk is full; the batch goes on when there is space."
ENDED = ("completed", "failed", "cancelled")
MAX_ERRORS = 100  # wrong lines that a failed batch lists


class InUse(MpillmError):
    """A file is the input of a batch that has not ended."""


class BatchError(msgspec.Struct):
    """The error of a batch, or of the line of its input that has a number."""

    message: str
    code: str
    line: int | None = None
    param: str | None = None


class BatchObject(msgspec.Struct, kw_only=True):
    """A batch as OpenAI describes it; times are seconds since 1970."""

    id: str
    object: str = "batch"
    endpoint: str | None  # the endpoint of all lines; None: each line names its own
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
    seconds_left: int | None = None  # not among OpenAI's keys
    metadata: dict[str, str] | None = None


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
        self._descriptions = Descriptions(folder, BatchObject)
        self.read, self.all = self._descriptions.read, self._descriptions.all
        self._files, self._arrivals, self._spec, self._model = files, arrivals, spec, model
        self._open_journal = open_journal
        self._running: dict[str, BatchRun] = {}
        self._changed = threading.RLock()
        # Inputs are checked, and results written, one after the other.
        self._pool = ThreadPoolExecutor(1, "batches")
        self._closing = threading.Event()
        self._waiting: set[str] = set()  # batches whose next step waits for space on the disk
        for batch in reversed(self.all()):
            if batch.status not in ENDED:
                self._submit(self._begin, batch.id)

    def add(self, input_file_id: str, endpoint: str | None, metadata: dict[str, str] | None) -> BatchObject:
        """Begin a batch; KeyError if there is no such file."""
        made = BatchObject(
            id=f"batch-{new_digits()}",
            endpoint=endpoint,
            input_file_id=input_file_id,
            created_at=int(time.time()),
            metadata=metadata,
        )
        with self._changed:  # the file stays
            self._files.content(input_file_id)
            self._descriptions.write(made)
        self._submit(self._begin, made.id)
        return made

    def now(self, batch: BatchObject) -> BatchObject:
        """Return the batch with its finished part, and with what it waits for."""
        run = self._running.get(batch.id)
        if run is not None:
            left = None if run.cancelled or run.waits else run.seconds_left()
            left = None if left is None else math.ceil(left)
            batch = msgspec.structs.replace(batch, request_counts=run.counts(), seconds_left=left)
        elif batch.status not in ENDED:  # after a restart its input is checked again first
            counts = counts_on_disk(self._descriptions.path(batch.id))
            batch = msgspec.structs.replace(batch, request_counts=counts)
        if batch.id in self._waiting or (run is not None and run.waits):
            batch = msgspec.structs.replace(batch, errors=_errors(BatchError(FULL_DISK, code="disk_full")))
        return batch

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

    def delete_file(self, name: str) -> None:
        """Forget a file; KeyError if there is none, InUse if a batch reads it."""
        with self._changed:
            for batch in self.all():
                if batch.input_file_id == name and batch.status not in ENDED:
                    raise InUse(f"The batch {batch.id} reads {name}; cancel it first, or wait for its end.")
            self._files.delete(name)

    def commit(self) -> None:
        """Bring what is finished to disk; the engine's thread calls it after every step."""
        with self._changed:
            for name, run in self._running.items():
                try:
                    run.commit()
                except MpillmError as error:
                    run.give_up()
                    self._submit(partial(self._fail, str(error), FAILED), name)

    def close(self) -> None:
        """Stop where everything is; the next start goes on from there."""
        self._closing.set()
        self._pool.shutdown(cancel_futures=True)
        for run in list(self._running.values()):
            run.close()

    def _set(self, batch: BatchObject, status: str, **changes: Any) -> None:
        batch.status = status
        if getattr(batch, f"{status}_at") is None:  # a restart does not begin it anew
            setattr(batch, f"{status}_at", int(time.time()))
        for key, value in changes.items():
            setattr(batch, key, value)
        self._descriptions.write(batch)

    def _submit(self, step: Callable[[str], None], name: str) -> None:
        """Let the pool do a step of a batch: again while the disk is full; a batch fails if the step does otherwise."""
        self._pool.submit(self._do, step, name)

    def _do(self, step: Callable[[str], None], name: str) -> None:
        failed = False
        while not self._closing.is_set():
            try:
                step(name)
                self._waiting.discard(name)
                return
            except NoSpace as error:
                if name not in self._waiting:
                    log.warning("%s", error)
                self._waiting.add(name)
                self._closing.wait(RETRY)
            except Exception as error:
                known = isinstance(error, MpillmError)
                message = str(error) if known else f"{type(error).__name__}: {error}"
                log.error("The batch %s has failed: %s", name, message, exc_info=not known)
                if failed:  # the list of failed lines could not be written
                    return
                code = BAD if isinstance(error, JobError) else FAILED
                failed, step = True, partial(self._fail, message, code)

    def _fail(self, message: str, code: str, name: str) -> None:
        with self._changed:
            self._set(self.read(name), "failed", errors=_errors(BatchError(message, code=code)))
            run = self._running.pop(name, None)
        if run is not None:
            run.close()

    def _begin(self, name: str) -> None:
        batch = self.read(name)
        try:
            title = self._files.read(batch.input_file_id).filename
            path = self._files.content(batch.input_file_id)
        except KeyError:
            raise JobError("The input file was deleted.") from None
        try:
            spec = msgspec.structs.replace(self._spec, input=title)
            checked = requests.check(path, spec, self._model, url=batch.endpoint)
        except JobError as error:
            raise JobError(str(error).replace(str(path), title)) from None
        run = BatchRun(checked, Claim(self._descriptions.path(name)), self._open_journal, self._model)
        with contextlib.ExitStack() as unless_begun:
            unless_begun.callback(run.close)
            with self._changed:
                if checked.bad == len(checked):
                    wrong = itertools.islice(checked.errors, MAX_ERRORS)
                    errors = [
                        BatchError(line.error or "", code=BAD, line=line.number, param=line.param)
                        for line in wrong
                    ]
                    self._set(batch, "failed", errors=_errors(*errors), request_counts=run.counts())
                    return
                if self.read(name).status == "cancelling":
                    run.cancel()
                else:
                    self._set(batch, "in_progress")
                self._running[name] = run
            unless_begun.pop_all()
        run.begin(self._arrivals.add_background, lambda: self._submit(self._end, name))

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
                    with open(path, "rb") as file:  # a server that was killed here may have added it before
                        title = f"{name}_{path.name}"
                        made = self._files.add(title, "batch_output", file, own=title)
                    setattr(batch, key, made.id)
                path.unlink()
            self._set(batch, "cancelled" if run.cancelled else "completed")
            del self._running[name]
        run.close()


def _errors(*errors: BatchError) -> dict[str, Any]:
    return {"object": "list", "data": msgspec.to_builtins(errors)}
