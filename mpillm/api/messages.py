"""The messages between a caller's process and rank 0, which travel over a Unix socket in MessagePack."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

import msgspec

from mpillm.store.records import Result


class OpenJob(msgspec.Struct, tag=True):
    """To rank 0, first: the job (see `mpillm.spec.Spec`), of which input and output are not used."""

    spec: dict[str, Any]


class AddLines(msgspec.Struct, tag=True):
    """To rank 0: lines of the batch format."""

    lines: list[bytes]


class CancelLines(msgspec.Struct, tag=True):
    """To rank 0: the rest of what was asked for is not wanted."""


class Ready(msgspec.Struct, tag=True):
    """From rank 0: the model is laid out."""

    model: str
    layout: str


class NewResults(msgspec.Struct, tag=True):
    """From rank 0: results, each with its index."""

    results: list[tuple[int, Result]]


class NoMoreResults(msgspec.Struct, tag=True):
    """From rank 0: these were all results."""


class Refused(msgspec.Struct, tag=True):
    """From rank 0, which ends: why, as a class of `mpillm.errors` and its sentence."""

    kind: str
    message: str


RankMessage = OpenJob | AddLines | CancelLines | Ready | NewResults | NoMoreResults | Refused


def send(connection: Connection, message: RankMessage) -> None:
    """Send a message; OSError if the other side is gone."""
    connection.send_bytes(msgspec.msgpack.encode(message))


def receive(connection: Connection) -> RankMessage:
    """Wait for a message; EOFError or OSError if the other side is gone."""
    found: RankMessage = msgspec.msgpack.decode(connection.recv_bytes(), type=RankMessage)
    return found
