"""Ranks of our own: processes that a caller's process starts, asks, and ends."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import IO

import msgspec

from mpillm import errors
from mpillm.api.messages import (
    AddLines,
    CancelLines,
    NewResults,
    NoMoreResults,
    OpenJob,
    Ready,
    Refused,
    receive,
    send,
)
from mpillm.errors import Interrupted, JobError, MpillmError
from mpillm.launching.mpiexec import as_root, end_session
from mpillm.spec import Spec
from mpillm.store.records import Result

ENDING = 10.0  # seconds for the ranks to end by themselves
TOLD = 5.0  # seconds for mpiexec to end them when it is told to
LOOK = 0.2  # seconds between two looks at ranks that start
# Of a launcher or of MPI in this process: with these the ranks would join it.
_FOREIGN = ("OMPI_COMM_WORLD_", "PMIX_", "PMI_", "PALS_", "HYDI_", "MPI_LOCAL")


class Remote:
    """A laid-out model in processes of its own, which end with this one, however it ends."""

    def __init__(self, spec: Spec, ranks: int) -> None:
        """Start the ranks and wait until the model is laid out; MpillmError says why it is not."""
        held = _Held()
        self._owner = held.owner
        self._close = weakref.finalize(self, held.end)  # also when this process ends
        self._log = held.log  # what the ranks say is read when they have ended
        with (  # the folder is gone once rank 0 has come, so that a process that is killed leaves none
            tempfile.TemporaryDirectory(prefix="mpillm-") as folder,
            socket.socket(socket.AF_UNIX) as listener,
        ):
            address = f"{folder}/socket"
            listener.bind(address)
            listener.listen(1)
            self._process = held.process = subprocess.Popen(
                [sys.executable, "-m", "mpillm", "ranks", address, "-n", str(ranks)],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=_environment(),
                start_new_session=True,  # Ctrl-C is for the caller alone
            )
            self._connection = held.connection = self._accept(listener)
        try:
            send(self._connection, OpenJob(msgspec.to_builtins(spec)))
            ready = self._receive()
        except BaseException:
            self.close()
            raise
        assert isinstance(ready, Ready)
        self.model, self.layout = ready.model, ready.layout

    @property
    def open(self) -> bool:
        """Whether the ranks can be asked."""
        return self._close.alive

    def ask(self, lines: Sequence[bytes]) -> Iterator[tuple[int, Result]]:
        """Yield the index and the result of each line when it is finished; the generator may be closed before its end.

        Interrupted if the ranks end meanwhile, which closes this.
        """
        over = False
        try:
            self._send(AddLines(list(lines)))
            while isinstance(message := self._receive(), NewResults):
                yield from message.results
            over = True
        except MpillmError:
            self.close()
            over = True
            raise
        finally:
            # The caller wants no more, or was interrupted. A process that was forked from it leaves the ranks alone.
            if not over and self.open and os.getpid() == self._owner:
                self._drain()

    def _drain(self) -> None:
        try:
            self._send(CancelLines())
            while not isinstance(self._receive(), NoMoreResults):
                pass
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the ranks."""
        self._close()

    def _accept(self, listener: socket.socket) -> Connection:
        """Rank 0's connection."""
        listener.settimeout(LOOK)
        try:
            while self._process.poll() is None:
                with contextlib.suppress(TimeoutError):
                    accepted, _ = listener.accept()
                    accepted.setblocking(True)
                    return Connection(accepted.detach())
        except BaseException:
            listener.close()  # so that ranks that come leave again, with what they have in shared memory
            self.close()
            raise
        raise self._ended()

    def _send(self, message: AddLines | CancelLines) -> None:
        try:
            send(self._connection, message)
        except OSError:
            raise self._ended() from None

    def _receive(self) -> Ready | NewResults | NoMoreResults:
        try:
            message = receive(self._connection)
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(message, Refused):
            raise getattr(errors, message.kind, MpillmError)(message.message)
        assert isinstance(message, Ready | NewResults | NoMoreResults)
        return message

    def _ended(self) -> MpillmError:
        """Return the message of the ranks when they ended."""
        if not self.open:
            return Interrupted("The LLM was closed before all answers had been read.")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDING)
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").splitlines()
        self.close()
        ours = [line.removeprefix("mpillm: ") for line in said if line.startswith("mpillm: ")]
        reason = (ours or [line for line in said if line.strip()] or ["they said nothing"])[-1]
        if ours and self._process.returncode == JobError.exit_code:
            return JobError(reason)  # it would end so again
        return Interrupted(f"The ranks have ended (exit code {self._process.returncode}): {reason}")


def _environment() -> dict[str, str]:
    """This process's environment without what a launcher has left there, and with what mpiexec asks of root."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return {**kept, **as_root()}


@dataclass
class _Held:
    """The processes and files that must be ended."""

    # The process that may end it: not one that was forked from it.
    owner: int = field(default_factory=os.getpid)
    log: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    process: subprocess.Popen[bytes] | None = None
    connection: Connection | None = None

    def end(self) -> None:
        """End the ranks: they leave without a connection, or mpiexec ends them; what then is left is killed.

        Killed, mpiexec would leave the shared memory of ranks that still start or load. Ctrl-C shortens the waiting.
        """
        if os.getpid() != self.owner:
            return
        try:
            if self.connection is not None:
                with (
                    contextlib.suppress(OSError),
                    socket.socket(fileno=os.dup(self.connection.fileno())) as both,
                ):
                    both.shutdown(socket.SHUT_RDWR)  # closing alone would not wake a thread that reads
                self.connection.close()
            if self.process is not None:
                _ended_within(self.process, ENDING)
        finally:
            self._end_now()

    def _end_now(self) -> None:
        try:
            if self.process is not None and self.process.poll() is None:
                self.process.terminate()
                _ended_within(self.process, TOLD)
        finally:
            if self.process is not None:
                end_session(self.process)
            self.log.close()


def _ended_within(process: subprocess.Popen[bytes], seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
