"""OpenAI's batches: an uploaded file becomes a job beside the clients' requests, and survives a restart.

`files/` in the server's directory has a file and its description for each upload; `batches/` has a description and an
output directory, as `mpillm run` leaves it, for each batch. A batch goes on from its journal.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from mpillm.batch import requests
from mpillm.batch.work import Model
from mpillm.errors import MpillmError
from mpillm.serve.arrivals import Arrivals
from mpillm.serve.batch_run import BatchRun, RequestCounts
from mpillm.serve.files import Descriptions, FileStore
from mpillm.spec import Spec
from mpillm.store.journal import Journal
from mpillm.store.output import Claim

ENDED = ("completed", "failed", "cancelled")


class InUse(MpillmError):
    """A file is the input of a batch that has not ended."""


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
        for batch in reversed(self.all()):
            if batch.status not in ENDED:
                self._pool.submit(self._begin, batch)

    def add(self, input_file_id: str, endpoint: str, metadata: dict[str, str] | None) -> BatchObject:
        """Begin a batch; KeyError if there is no such file."""
        made = BatchObject(
            id=f"batch-{uuid.uuid4().hex[:24]}",
            endpoint=endpoint,
            input_file_id=input_file_id,
            created_at=int(time.time()),
            metadata=metadata,
        )
        with self._changed:  # the file stays
            self._files.content(input_file_id)
            self._descriptions.write(made)
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
            for run in self._running.values():
                run.commit()

    def close(self) -> None:
        """Stop where everything is; the next start goes on from there."""
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

    def _begin(self, batch: BatchObject) -> None:
        try:
            path = self._files.content(batch.input_file_id)
            checked = requests.check(path, self._spec, self._model)
            run = BatchRun(checked, Claim(self._descriptions.path(batch.id)), self._open_journal, self._model)
        except (MpillmError, KeyError) as error:
            message = "The input file was deleted." if isinstance(error, KeyError) else str(error)
            with self._changed:
                self._set(batch, "failed", errors={"object": "list", "data": [{"message": message}]})
            return
        tickets = run.tickets(lambda: self._pool.submit(self._end, batch.id))
        with self._changed:
            if self.read(batch.id).status == "cancelling":
                run.cancel()
            else:
                self._set(batch, "in_progress")
            self._running[batch.id] = run
        self._arrivals.add_background(tickets)

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
