"""Heartbeats: each rank tells rank 0 once a second that it lives, and hears the same from rank 0.

A thread of every rank does this over a TCP connection. The thread takes no part in MPI and runs while the main thread
computes or waits, so a busy rank is never taken for dead. TCP works wherever ranks of several machines can meet (MPI
without a fabric uses it too); it needs no opened port, no shared directory and no synchronised clocks, and the kernel
reports at once when a process ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence

from mpillm.comm import deadline
from mpillm.comm.launch import to_continue
from mpillm.comm.rendezvous import Rendezvous
from mpillm.comm.stillness import Stillness
from mpillm.errors import Interrupted

log = logging.getLogger(__name__)

AFTER_CLOSE = 3.0  # seconds in which the launcher may end the world itself after a process has ended
CONNECTING = 2.0  # seconds for each address of rank 0, and for a new connection to identify itself
MAX_UNIDENTIFIED = 64  # connections beyond the number of ranks that may wait to be identified

_ALIVE, _LEAVING, _END = b".", b"-", b"!"
_HELLO = struct.Struct("<16sI")  # token, rank


class _Peer:
    """A rank at the other end of a connection, which is lost after `remaining` more seconds of silence."""

    def __init__(self, rank: int, connection: socket.socket, remaining: float) -> None:
        self.rank, self.connection, self.remaining = rank, connection, remaining
        self.closed = False

    def send(self, message: bytes) -> None:
        # A full connection means that nobody reads it; then `remaining` runs out on the other side.
        with contextlib.suppress(OSError):
            self.connection.send(message)


class _Unidentified:
    """A new connection that has not yet sent its token."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection, self.received, self.remaining = connection, b"", CONNECTING


class Heartbeat:
    """This rank's heartbeat and its watch over others: rank 0 watches all ranks, the others watch rank 0."""

    def __init__(
        self,
        rank: int,
        hosts: Sequence[str],
        rendezvous: Rendezvous,
        listener: socket.socket | None,
        near: bool,
        each_beat: Callable[[], None] | None = None,
    ) -> None:
        """Start the thread. `listener` is rank 0's (see `rendezvous.listen`); `near`: rank 0 is on this machine.

        `each_beat` is given where the world survives lost ranks (see `faults`), and is called once a beat; then a lost
        rank sets `lost` instead of ending this process.
        """
        self._rank, self._hosts, self._rendezvous, self._near = rank, hosts, rendezvous, near
        self._listener, self._each_beat = listener, each_beat
        self.lost = False
        #: While this is set, this process ends if it does nothing for as long as the limit.
        self.computing = False
        self._stillness, self._idle = Stillness(), 0.0
        self._interval = deadline.interval(rendezvous.limit)
        self._peers: list[_Peer] = []
        self._unidentified: list[_Unidentified] = []
        self._selector = selectors.DefaultSelector()
        self._stopped = False
        self._wake, self._waker = os.pipe()
        self._selector.register(self._wake, selectors.EVENT_READ, self._receive_stop)
        if listener is not None:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, self._accept)
        else:
            self._connect()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def limit(self) -> float:
        """Seconds of silence that end the world."""
        return self._rendezvous.limit

    def stop(self) -> None:
        """Tell the others that this rank leaves, and end the thread."""
        os.write(self._waker, _LEAVING)
        self._thread.join()
        os.close(self._waker)
        os.close(self._wake)

    def end_all(self, code: int) -> None:
        """Tell the other ranks to end with this exit code; from another rank it goes by way of rank 0."""
        for peer in list(self._peers):
            peer.send(_END + bytes([code]))

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopped:
            for key, _ in self._selector.select(max(0.0, due - time.monotonic())):
                key.data()
            if time.monotonic() >= due:
                self._beat()
                due = time.monotonic() + self._interval
        for peer in self._peers:
            peer.send(_LEAVING)
            peer.connection.close()
        for unidentified in self._unidentified:
            unidentified.connection.close()
        if self._listener is not None:
            self._listener.close()
        self._selector.close()

    def _beat(self) -> None:
        """Send a heartbeat and count down. Silence is counted in own beats: a rank that was stopped blames nobody."""
        for peer in self._peers:
            peer.send(_ALIVE)
            peer.remaining -= self._interval
            if peer.remaining <= 0:
                self._end(peer)
        for unidentified in list(self._unidentified):
            unidentified.remaining -= self._interval
            if unidentified.remaining <= 0:
                self._reject(unidentified)
        idle = self._stillness.look() and self.computing
        self._idle = self._idle + self._interval if idle else 0.0
        if self._idle >= self.limit:
            self._end_hanging()
        if self._each_beat is not None:
            self._each_beat()

    def _receive_stop(self) -> None:
        self._stopped = True

    def _add(self, peer: _Peer) -> None:
        peer.connection.setblocking(False)
        self._peers.append(peer)
        self._selector.register(peer.connection, selectors.EVENT_READ, lambda: self._receive(peer))

    def _receive(self, peer: _Peer) -> None:
        try:
            received = peer.connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if _END in received:  # whoever ends the world has reported the reason
            code = received[received.index(_END) + 1 :][:1] or bytes([Interrupted.exit_code])
            self.end_all(code[0])
            os._exit(code[0])
        if _LEAVING in received:
            self._close(peer)
            self._peers.remove(peer)
        elif received:
            peer.remaining = self.limit
        elif self._each_beat is not None:
            self._close(peer)
            self._peers.remove(peer)
            self.lost = True
        else:
            self._close(peer)
            peer.closed, peer.remaining = True, min(peer.remaining, AFTER_CLOSE)

    def _close(self, connected: _Peer | _Unidentified) -> None:
        self._selector.unregister(connected.connection)
        connected.connection.close()

    def _accept(self) -> None:
        """Rank 0: accept a connection. It identifies itself later, because the others must hear this rank meanwhile."""
        assert self._listener is not None
        with contextlib.suppress(OSError):
            unidentified = _Unidentified(self._listener.accept()[0])
            self._unidentified.append(unidentified)
            self._selector.register(
                unidentified.connection, selectors.EVENT_READ, lambda: self._identify(unidentified)
            )
            if len(self._unidentified) > len(self._hosts) + MAX_UNIDENTIFIED:
                self._reject(self._unidentified[0])

    def _identify(self, unidentified: _Unidentified) -> None:
        """Rank 0: accept a rank that knows the token, and answer with the token reversed."""
        received = b""
        with contextlib.suppress(OSError):
            received = unidentified.connection.recv(_HELLO.size - len(unidentified.received))
        unidentified.received += received
        if received and len(unidentified.received) < _HELLO.size:
            return
        token, rank = _HELLO.unpack(unidentified.received.ljust(_HELLO.size, b"\0"))
        if secrets.compare_digest(token, self._rendezvous.token) and 0 < rank < len(self._hosts):
            self._unidentified.remove(unidentified)
            self._selector.unregister(unidentified.connection)
            peer = _Peer(rank, unidentified.connection, self.limit)
            self._add(peer)
            peer.send(_answer(token))
        else:
            self._reject(unidentified)

    def _reject(self, unidentified: _Unidentified) -> None:
        self._unidentified.remove(unidentified)
        self._close(unidentified)

    def _connect(self) -> None:
        """Connect to rank 0. The token proves that it is this world's: machines may share a private address.

        If no address leads to rank 0 (most likely because of a firewall), this rank has no deadline and warns.
        """
        addresses = self._rendezvous.addresses
        for address in (*(["127.0.0.1"] if self._near else []), *addresses):
            with contextlib.suppress(OSError), contextlib.ExitStack() as unless_found:
                connection = socket.create_connection((address, self._rendezvous.port), CONNECTING)
                unless_found.enter_context(connection)
                connection.sendall(_HELLO.pack(self._rendezvous.token, self._rank))
                expected = _answer(self._rendezvous.token)
                if connection.recv(len(expected), socket.MSG_WAITALL) == expected:
                    unless_found.pop_all()
                    self._add(_Peer(0, connection, self.limit))
                    return
        log.warning(
            "[%d] no connection to rank 0 at %s; this rank would not notice if rank 0 stopped responding",
            self._rank, addresses,
        )  # fmt: skip

    def _end(self, lost: _Peer) -> None:
        """Report who is lost, and end this process; rank 0 ends the world."""
        if self._rank:
            time.sleep(0.1 * min(self._rank, 10))  # one report is enough when several ranks have lost rank 0
        who = f"Rank {lost.rank} on {self._hosts[lost.rank]}"
        if lost.closed:
            self._report(f"{who} has ended")
        else:
            self._report(
                f"{who} has not responded for {self.limit:g} s: it is stopped, its machine is down, or the "
                "network is interrupted"
            )
        self.end_all(Interrupted.exit_code)
        os._exit(Interrupted.exit_code)

    def _end_hanging(self) -> None:
        """Report that this rank makes no progress, and end it."""
        self._report(f"This rank has made no progress for {self.limit:g} s: it hangs")
        if self._each_beat is not None:  # the others continue without a rank that is killed
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(Interrupted.exit_code)

    def _report(self, what: str) -> None:
        speaker = f"[{self._rank}@{self._hosts[self._rank]}]" if self._rank else "mpillm:"
        sys.stderr.write(f"{speaker} {what}{to_continue(os.environ)}.\n")
        sys.stderr.flush()


def _answer(token: bytes) -> bytes:
    return token[::-1]
