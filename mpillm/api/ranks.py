"""The ranks that a caller's process has started: rank 0 reads its requests from a socket, all others follow."""

from __future__ import annotations

from contextlib import closing
from multiprocessing.connection import Client, Connection

import msgspec

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
from mpillm.comm.world import World
from mpillm.errors import MpillmError
from mpillm.run.service import Service
from mpillm.spec import Spec


def serve(world: World, address: str) -> int:
    """Answer what comes over the socket until its other end is closed (collective); the exit code."""
    connection, spec = _opened(address) if world.rank == 0 else (None, None)
    try:
        shared = world.bcast(spec)
        if shared is None:
            return 0
        with closing(Service(world, shared, leave_out=True)) as service:
            if world.spare:
                world.stand_by()
                return 0
            if connection is not None:  # a caller that is gone by now is noticed next
                _tell(connection, Ready(service.model.name, str(service.layout)))
            while world.bcast((lines := _next(connection)) is not None):
                if connection is None:
                    service.follow()
                else:
                    assert lines is not None
                    _answer(service, lines, connection)
        return 0
    except MpillmError as error:
        if connection is not None:
            _tell(connection, Refused(type(error).__name__, str(error)))
        raise
    finally:
        if connection is not None:
            connection.close()


def _opened(address: str) -> tuple[Connection | None, Spec | None]:
    """Return the connection to the caller and its job; no job if the caller has gone already."""
    connection = None
    try:
        connection = Client(address, "AF_UNIX")
        first = receive(connection)
    except (EOFError, OSError):
        return connection, None
    assert isinstance(first, OpenJob)
    return connection, msgspec.convert(first.spec, Spec)


def _next(connection: Connection | None) -> list[bytes] | None:
    """Return the lines that come next, on rank 0; None when the caller is gone, and on the other ranks."""
    while connection is not None:
        try:
            message = receive(connection)
        except (EOFError, OSError):
            break
        if isinstance(message, AddLines):
            return message.lines
        assert isinstance(message, CancelLines)  # came when all was over
    return None


def _answer(service: Service, lines: list[bytes], connection: Connection) -> None:
    """Send results until all are sent or no more are wanted."""
    with closing(service.answers(lines)) as steps:
        for results in steps:
            if results and not _tell(connection, NewResults(results)):
                return
            if connection.poll():
                try:
                    message = receive(connection)
                except (EOFError, OSError):
                    return
                assert isinstance(message, CancelLines)
                break
    _tell(connection, NoMoreResults())


def _tell(connection: Connection, message: Ready | NewResults | NoMoreResults | Refused) -> bool:
    """Send a message; whether the caller is still there."""
    try:
        send(connection, message)
    except OSError:
        return False
    return True
