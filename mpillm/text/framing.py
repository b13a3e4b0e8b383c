"""Messages over a socket, each with its length before it."""

from __future__ import annotations

import socket
import struct
import time

MAX_ANSWER = 1 << 28  # bytes of a message that has a deadline

_LENGTH = struct.Struct("<Q")


def send(to: socket.socket, data: bytes, until: float | None = None) -> None:
    """Send a message by `until` (as time.monotonic() says); raise OSError if that is impossible."""
    for part in (_LENGTH.pack(len(data)), data):
        _limit(to, until)
        to.sendall(part)


def receive(by: socket.socket, until: float | None = None) -> bytes:
    """Return the next message; raise OSError if there is none."""
    (length,) = _LENGTH.unpack(_read(by, _LENGTH.size, until))
    if until is not None and length > MAX_ANSWER:
        raise OSError("too long an answer")
    return _read(by, length, until)


def _read(by: socket.socket, length: int, until: float | None) -> bytes:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        _limit(by, until)
        if not (count := by.recv_into(view)):
            raise ConnectionResetError("the other side has closed")
        view = view[count:]
    return bytes(data)


def _limit(which: socket.socket, until: float | None) -> None:
    if until is not None:
        which.settimeout(max(until - time.monotonic(), 0.001))
