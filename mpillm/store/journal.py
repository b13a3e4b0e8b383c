"""The journal: an append-only file of records with checksums. A stopped run continues from it; results are made of it.

The first record is the header (what job this is), the next one the input's lines, and then the header once more, so
that no single damage hides what the results behind it belong to. Then come results, in the order in which they were
finished, and parts of long answers that are not finished yet; the layout, wherever what follows was computed on
another one; and lines again where the input grew. A record of a kind that the reader does not know is passed over. The
last one says that the results have been written.

Results are brought to disk in groups: not more often than SYNC_EVERY, and so seldom that waiting for the disk stays
under SYNC_SHARE of the time, however slow it is, unless WAITING records have come together. What a crash finds between
two syncs is computed again.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from mpillm.batch.work import Line
from mpillm.engine.request import PartialCompletion
from mpillm.errors import Interrupted, OutputError
from mpillm.store.directory import Descriptor, explained, explanation
from mpillm.store.journal_facts import began
from mpillm.store.output import JOURNAL, Claim
from mpillm.store.records import (
    VERSION,
    Counts,
    Done,
    Finished,
    InputKeys,
    JournalHeader,
    Name,
    PartialResult,
    Result,
    Scan,
    UsedLayout,
    Verified,
    framed,
    line_key,
    payload_at,
    scan,
)
from mpillm.store.same_job import refuse_changed_lines, refuse_other_job
from mpillm.version import __version__
from mpillm.words import count_of

log = logging.getLogger(__name__)

SYNC_EVERY = 0.1  # seconds
COUNT_EVERY = 10.0  # seconds after which the counts are written although there are no results
SYNC_SHARE = 0.02
WAITING = 1 << 10  # maximum number of records that wait for a write


class Journal(Descriptor):
    """An open journal. A result counts once `flush` has returned: then it is on disk.

    When the journal is closed, what was not flushed is lost.

    `done` knows what was finished, by custom_id (also in runs before this one); `damage` has a sentence for each
    stretch of the file that a disk or a person has changed: the requests in it are simply run again. `answered` says
    on which layouts earlier runs have answered how many requests, and `counts` what each start has computed.

    `counted`, if set, says what this start has computed so far; it is written with the results.
    """

    def __init__(
        self,
        claim: Claim,
        identity: Mapping[str, Any],
        lines: Iterable[Line],
        layout: UsedLayout | None = None,
        model_state: str = "",
        watched: bool = False,
    ) -> None:
        """Open the journal of the claimed directory, or create it; `layout` is that of the results to append.

        `model_state` has the states of the model's files on all hosts (`Watch.state`), with a "+" between them. If it
        differs from the journal's by more than hosts that left or hosts that joined, what was appended after the last
        `mark_verified` is dropped; but not if the ranks have `watched` the files since they wrote the journal.

        OutputError if it belongs to another job, or if the input lacks a line that it had before.
        """
        self.path = claim.path / JOURNAL
        self._directory = claim.directory
        self.damage: list[str] = []
        self.counted: Callable[[], Counts] | None = None
        self.seconds = 0.0  # spent on writing
        self._due = time.monotonic()  # when the next write is due
        self._waiting: list[Result | PartialResult | UsedLayout | Counts | Verified] = []
        self._layout, self._state = layout, model_state
        self._partial: dict[str, list[int]] = {}
        gathered = bytearray()
        for line in lines:
            gathered += line_key(line)
        keys = bytes(gathered)
        del gathered
        header = JournalHeader(
            VERSION, msgspec.to_builtins(dict(identity)), began(claim).isoformat(), __version__
        )
        if JOURNAL not in self._directory.names():
            with self._directory.replacing(JOURNAL) as file:
                file.write(framed(header, 0))
                file.write(framed(InputKeys(keys), file.tell()))
                file.write(framed(header, file.tell()))
                file.write(framed(Verified(file.tell(), model_state), file.tell()))
        with explained(self.path):
            self._file = self._directory.open(JOURNAL, os.O_RDWR)
        try:
            self._resume(header, keys, lines, watched)
        except BaseException:
            self.close()
            raise
        self.resumed = len(self.done)

    def _resume(self, header: JournalHeader, keys: bytes, lines: Iterable[Line], watched: bool) -> None:
        with explained(self.path):
            found = scan(self._file)
        if found.header is None:
            raise OutputError(
                f"The journal {self.path} is damaged: it does not say which job it belongs to; to start "
                "over, move it away or give another output."
            )
        for start, end in found.damage:
            self.damage.append(
                f"The journal {self.path} is damaged in bytes {start} to {end}; the requests in it run again."
            )
        kept = found.header
        refuse_other_job(self.path, kept, header)
        old = found.keys or b""
        if found.damage or not keys.startswith(old):
            refuse_changed_lines(self.path, old, keys, lines, self._names(found.done))
        # From here on the journal is known to be of this job, and may be written to.
        with explained(self.path):
            if not watched:
                found = self._without_unverified(found)
            size = os.fstat(self._file).st_size
        self.done, self._partial = found.done, found.partial
        self.answered, self._last_layout = found.answered, found.layout
        self.counts = tuple(found.counts.values())
        self._end = found.end
        if size > self._end:
            log.info(
                "The journal's last record was not finished (%d bytes); it was removed.", size - self._end
            )
            with explained(self.path):
                os.ftruncate(self._file, self._end)
        if found.headers < 2:  # one of the two was damaged
            self._write(framed(kept, self._end))
        if found.keys != keys:
            self._write(framed(InputKeys(keys), self._end))
        self._unmarked = 0  # successful checks until everything that was appended is verified
        self._checked = self._end  # where the journal ended at the last successful check of the model
        self._verified = self._end  # everything before this offset is verified
        if found.verified is None or found.verified.state != self._state:
            self._write(framed(Verified(self._end, self._state), self._end))

    def _without_unverified(self, found: Scan) -> Scan:
        """Return the content of the journal, without what may have been computed with other files of the model."""
        if found.verified is None:
            return found
        stored, now = set(found.verified.state.split("+")), set(self._state.split("+"))
        if stored <= now or now <= stored:
            return found
        before = len(found.done)
        os.ftruncate(self._file, found.verified.upto)
        found = scan(self._file)
        if dropped := before - len(found.done):
            self.damage.append(
                f"The model's files were modified, replaced or moved to other hosts since the journal {self.path} "
                f"was written: the last {count_of(dropped, 'request')} will run again."
            )
        return found

    def join(self, model_states: Iterable[str]) -> None:
        """Note the states of the model's files on hosts whose results may follow."""
        state = "+".join(sorted({*self._state.split("+"), *model_states}))
        if state != self._state:
            self._state = state
            self._waiting.append(Verified(self._verified, state))

    def mark_verified(self, all_ranks: bool = False) -> None:
        """Note that the model's files are unchanged.

        If all ranks have checked them, everything up to here is verified. If only this one has, others may find a
        change at their next check, so only what was there at the previous check is verified.
        """
        self._verified, self._checked = self._end if all_ranks else self._checked, self._end
        if self._unmarked:
            self._waiting.append(Verified(self._verified, self._state))
            self._unmarked -= 1

    def drop_unverified(self) -> None:
        """Drop unverified records, because the model's files have changed."""
        self._waiting.clear()
        with explained(self.path):
            os.ftruncate(self._file, self._verified)
        self._end = self._verified
        self._write(framed(Verified(self._end, self._state), self._end))
        self.done.drop_from(self._verified)

    def append(self, record: Result | PartialResult) -> None:
        """Append a finished or partial result; it is on disk after the next `flush`."""
        if self._layout is not None and self._layout != self._last_layout:
            self._waiting.append(self._layout)
            self._last_layout = self._layout
        self._waiting.append(record)
        self._unmarked = 2

    def commit(self) -> int:
        """`flush`, if it is due; call this often."""
        late = time.monotonic() - self._due
        if self.counted is not None and late > COUNT_EVERY and not self._waiting:
            self._waiting.append(self.counted())
        return self.flush() if late >= 0 or len(self._waiting) >= WAITING else 0

    def flush(self) -> int:
        """Write what was appended to the disk in one go, and return the number of requests that it finishes.

        NoSpace if the disk is full: nothing is lost, and a later flush may succeed.
        """
        if not self._waiting:
            return 0
        if self.counted is not None and not isinstance(self._waiting[-1], Counts):
            self._waiting.append(self.counted())
        data, places, at = [], [], self._end
        for record in self._waiting:
            data.append(framed(record, at))
            if isinstance(record, Result):
                places.append((record.custom_id, at, record.status))
            at += len(data[-1])
        start = time.monotonic()
        self._write(b"".join(data))
        now = time.monotonic()
        self.seconds += now - start
        self._due = now + max(SYNC_EVERY, (now - start) * (1 / SYNC_SHARE - 1))
        for place in places:
            self.done.add(*place)
        self._waiting.clear()
        return len(places)

    def check(self) -> None:
        """Raise Interrupted if the file was deleted or replaced; call this regularly."""
        if not self._directory.holds(JOURNAL, self._file):
            raise Interrupted(
                f"The journal {self.path} was deleted or replaced during the run; put it back and run the "
                "same command again, which starts over without it."
            )

    def finish(self, errors: int) -> None:
        """Note that the results are written, which makes the run complete."""
        self._write(framed(Finished(errors), self._end))

    def _write(self, data: bytes) -> None:
        """Append to the file and sync it; after a failure the file is as long as before."""
        try:
            view, at = memoryview(data), self._end
            while view:
                written = os.pwrite(self._file, view, at)
                view, at = view[written:], at + written
            os.fdatasync(self._file)
        except OSError as error:
            self._cut()
            raise explanation(self.path, error) from error
        self._end += len(data)

    def _cut(self) -> None:
        try:
            os.ftruncate(self._file, self._end)
        except OSError as error:  # the next start drops such bytes
            log.warning("The unfinished end of %s stays for now: %s.", self.path, error.strerror)

    def read(self, custom_id: str) -> Result:
        """Return the record of a finished request; Interrupted if it is damaged: the next run answers it again."""
        offset = self.done.offset(custom_id)
        with explained(self.path):
            payload = payload_at(self._file, offset, os.fstat(self._file).st_size)
        if payload is None:
            raise Interrupted(
                f"The journal {self.path} is damaged at byte {offset} (custom_id {custom_id!r}); "
                "run the same command again."
            )
        return msgspec.msgpack.decode(payload, type=Result)

    def finished(self) -> Iterator[str]:
        """Return the custom_ids of the finished requests, in the order in which they were finished."""
        return (name.custom_id for name in self._names(self.done))

    def _names(self, done: Done) -> Iterator[Name]:
        with explained(self.path):
            size = os.fstat(self._file).st_size
            for offset in done.offsets():
                if (payload := payload_at(self._file, offset, size)) is not None:
                    yield msgspec.msgpack.decode(payload, type=Name)

    def partial(self, line: Line) -> dict[int, PartialCompletion]:
        """Return the tokens that earlier runs generated for an unfinished line, by choice; only once for a line."""
        found: dict[int, PartialCompletion] = {}
        with explained(self.path):
            size = os.fstat(self._file).st_size
            for offset in self._partial.pop(line.custom_id, ()):
                payload = payload_at(self._file, offset, size)
                part = msgspec.msgpack.decode(payload, type=PartialResult) if payload is not None else None
                if part is not None and part.key == line_key(line):
                    before = found.get(part.choice, PartialCompletion(tokens=[]))
                    found[part.choice] = before.continued(part.start, part.completion)
        return {choice: partial for choice, partial in found.items() if partial.tokens}
