"""The connections of a worker: to its root, and to the root's other workers.

The messages are those of Distributed-Llama's src/nn/nn-network.cpp: little-endian numbers, without frames.
"""

from __future__ import annotations

import logging
import socket
import struct
from typing import Any

from mpillm.errors import JobError, MpillmError

log = logging.getLogger(__name__)

ACKNOWLEDGED = 23571114
MOST_NODES = 1024
MOST_STRING = 4096
MOST_PORT = 65535


class RootLostError(MpillmError):
    """The root, or another worker, has closed its connection."""

    exit_code = 75


class StrangeRootError(MpillmError):
    """The program that has connected does not use the protocol of a root of the known version."""


class Link:
    """A connection to one node."""

    def __init__(self, connection: socket.socket, who: str) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self.who = connection, who

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of it; RootLostError if the node is gone."""
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise RootLostError(f"The connection to {self.who} broke ({error.strerror}).") from None

    def read_into(self, data: memoryview) -> None:
        """Fill `data`; RootLostError if the node is gone."""
        at = 0
        while at < len(data):
            try:
                count = self._socket.recv_into(data[at:])
            except OSError as error:
                raise RootLostError(f"The connection to {self.who} broke ({error.strerror}).") from None
            if not count:
                raise RootLostError(f"{self.who} has closed its connection.")
            at += count

    def read(self, count: int) -> bytearray:
        """Read `count` bytes."""
        data = bytearray(count)
        self.read_into(memoryview(data))
        return data

    def numbers(self, layout: str) -> tuple[Any, ...]:
        """Little-endian numbers as `struct` has them."""
        return struct.unpack(f"<{layout}", self.read(struct.calcsize(f"<{layout}")))

    def number(self) -> int:
        """Return a number of 32 bits."""
        return int(self.numbers("I")[0])

    def string(self) -> str:
        """Return a string with its length, which counts the zero at its end."""
        length = self.number()
        if not 0 < length <= MOST_STRING:
            raise StrangeRootError(f"{self.who} sent a name of {length} bytes: it is of another version.")
        return self.read(length)[:-1].decode("utf-8", "replace")

    def acknowledge(self) -> None:
        """Say that what was read is understood."""
        self.write(struct.pack("<I", ACKNOWLEDGED))

    def await_acknowledgement(self) -> None:
        """Wait until the other node says so."""
        if (found := self.number()) != ACKNOWLEDGED:
            raise StrangeRootError(
                f"{self.who} sent {found} where it should acknowledge: it is of another version."
            )

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def listen(host: str, port: int) -> socket.socket:
    """Return the socket that roots connect to; JobError if it cannot be had."""
    if port > MOST_PORT:
        raise JobError(f"--port {port} cannot be listened on: ports go up to {MOST_PORT}.")
    try:
        return socket.create_server((host, port))
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]  # Python adds the address
        raise JobError(
            f"{host}:{port} cannot be listened on: {reason}; give another --host or --port."
        ) from None


def meet(server: socket.socket) -> list[Link]:
    """Wait for a root and meet its other workers; the links, the root's first, the others' in the root's order.

    Workers before this one connect to it, and it takes them for what their order says. It connects to those behind it,
    the last one first: a worker goes on when all before it have come, so that nobody overtakes another.
    """
    connection, address = server.accept()
    root = Link(connection, f"The root at {address[0]}")
    log.info("%s has connected", root.who)
    links = [root]
    try:
        count, own = root.numbers("II")
        if not 0 < count <= MOST_NODES or own >= count:
            raise StrangeRootError(
                f"{root.who} speaks of worker {own} of {count}: it is not a root of Distributed-Llama."
            )
        others = [(root.string(), *root.numbers("i")) for _ in range(count - 1)]
        root.acknowledge()
        root.await_acknowledgement()
        for host, port in others[:own]:
            links.append(Link(server.accept()[0], f"The worker at {host}:{port}"))
        for host, port in reversed(others[own:]):
            links.insert(own + 1, _connected(host, port))
    except BaseException:
        close(links)
        raise
    return links


def close(links: list[Link]) -> None:
    """Close all of them."""
    for link in links:
        link.close()


def _connected(host: str, port: int) -> Link:
    who = f"The worker at {host}:{port}"
    try:
        return Link(socket.create_connection((host, port)), who)
    except (OSError, OverflowError) as error:
        raise RootLostError(f"{who} cannot be reached: {error}.") from None
