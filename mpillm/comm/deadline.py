"""A deadline for ranks that fall silent: stopped, on a machine that has died, or behind a cut cable.

MPI waits for such a rank for ever, and its launcher notices none of them. So a thread of every rank says once a second
that its process lives, over a TCP connection to rank 0, and hears the same from there. It takes no part in MPI, and
goes on while the main thread computes or waits, so a rank is never taken for dead because it is busy. TCP, because
it works wherever ranks of several machines can meet (MPI without a fabric does the same), needs no port that somebody
has opened, no shared directory, and no clocks that agree; and because the kernel says at once when a process ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from mpillm.comm import launch
from mpillm.comm.stillness import Stillness
from mpillm.errors import Interrupted, JobError

log = logging.getLogger(__name__)

VARIABLE = "MPILLM_DEADLINE"
LIMIT = 20.0  # seconds of silence: longer than a crowded machine stalls, and the world ends within 30
STARTING = 6  # while ranks start, and cannot hear each other, this many times as long
BEAT = 1.0  # seconds, unless the limit is short
AFTER_CLOSE = (
    3.0  # seconds in which the launcher may end the others itself, once a process is gone without a word
)
CONNECTING = 2.0  # seconds for each address of rank 0's machine, and for who knocks there to say who it is
STRANGERS = 64  # so many more than there are ranks may be at the door at once

_ALIVE, _LEAVING, _END = b".", b"-", b"!"
_HELLO = struct.Struct("<16sI")  # the token, the rank
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


@dataclass(frozen=True)
class Door:
    """Where rank 0 listens, and by what it and the others know each other."""

    addresses: tuple[str, ...]
    port: int
    token: bytes
    limit: float


def limit(environ: Mapping[str, str]) -> float:
    """The seconds of silence that MPILLM_DEADLINE allows; 0 means for ever (a debugger stops ranks)."""
    text = environ.get(VARIABLE, str(LIMIT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise JobError(f"{VARIABLE} = {text!r} is not a number of seconds (0: no deadline).")
    return seconds


def die_with_launcher() -> None:
    """Let the kernel kill this process when the launcher that started it is gone, even if it is stopped then."""
    parent = os.getppid()
    if not launch.starter_folder():
        return
    with contextlib.suppress(OSError, AttributeError):  # not Linux: then nothing but MPI itself notices
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def alarm(seconds: float) -> None:
    """End this process by SIGALRM after so many seconds, unless told otherwise before; 0: do not.

    For MPI_Finalize, which waits for all ranks and keeps Python's lock meanwhile: no thread can watch it.
    """
    signal.setitimer(signal.ITIMER_REAL, seconds)


def starting_limit(environ: Mapping[str, str]) -> float:
    """The seconds that ranks may take to meet (see `meeting`); 0 means for ever."""
    try:
        return STARTING * limit(environ)
    except JobError:  # it is said when the ranks have met
        return STARTING * LIMIT


def beat(limit: float) -> float:
    """The seconds between two looks at the others."""
    return min(BEAT, limit / 4)


def open_door(seconds: float) -> tuple[socket.socket, Door]:
    """Rank 0: listen on all networks of this machine."""
    listener = socket.socket()
    listener.bind(("", 0))
    listener.listen(128)
    return listener, Door(own_addresses(), listener.getsockname()[1], secrets.token_bytes(16), seconds)


def own_addresses() -> tuple[str, ...]:
    """This machine's IPv4 addresses, without the loopback's."""
    found = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not ipaddress.ip_address(address.address).is_loopback
    ]
    return tuple(found)


class _Peer:
    """A rank at the other end of a connection, and how long it may still be silent."""

    def __init__(self, rank: int, connection: socket.socket, patience: float) -> None:
        self.rank, self.connection, self.patience = rank, connection, patience
        self.closed = False

    def say(self, word: bytes) -> None:
        # A connection that takes no more is one that nobody listens to: patience is what ends that.
        with contextlib.suppress(OSError):
            self.connection.send(word)


class _Guest:
    """Somebody who has connected, and has not said the token yet."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection, self.words, self.patience = connection, b"", CONNECTING


class Watch:
    """This rank's heartbeat, and its ear for those of others: rank 0 hears all, the others hear rank 0."""

    def __init__(
        self,
        rank: int,
        hosts: Sequence[str],
        door: Door,
        listener: socket.socket | None,
        near: bool,
        each_beat: Callable[[], None] | None = None,
    ) -> None:
        """Begin. `listener` is rank 0's (see `open_door`); `near` says that rank 0 is on this machine.

        `each_beat` is given where ranks may die (see `faults`), and is called once a beat: a rank that is gone does
        not end this one then, but makes `lost` true.
        """
        self._rank, self._hosts, self._door, self._listener, self._near = rank, hosts, door, listener, near
        self._each_beat = each_beat
        self.lost = False
        self.computing = (
            False  # while it is set, this rank is ended if it does nothing for as long as the limit
        )
        self._stillness, self._idle = Stillness(), 0.0
        self._beat = beat(door.limit)
        self._peers: list[_Peer] = []
        self._guests: list[_Guest] = []
        self._selector = selectors.DefaultSelector()
        self._stopped = False
        self._wake, self._waker = os.pipe()
        self._selector.register(self._wake, selectors.EVENT_READ, self._hear_stop)
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
        return self._door.limit

    def stop(self) -> None:
        """Tell the others that this rank leaves, and watch no longer."""
        os.write(self._waker, _LEAVING)
        self._thread.join()
        os.close(self._waker)
        os.close(self._wake)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopped:
            for key, _ in self._selector.select(max(0.0, due - time.monotonic())):
                key.data()
            if time.monotonic() >= due:
                self._tick()
                due = time.monotonic() + self._beat
        for peer in self._peers:
            peer.say(_LEAVING)
            peer.connection.close()
        for guest in self._guests:
            guest.connection.close()
        if self._listener is not None:
            self._listener.close()
        self._selector.close()

    def _tick(self) -> None:
        """Speak, and count: silence is counted in own beats, so a rank that was stopped itself accuses nobody."""
        for peer in self._peers:
            peer.say(_ALIVE)
            peer.patience -= self._beat
            if peer.patience <= 0:
                self._end(peer)
        for guest in list(self._guests):
            guest.patience -= self._beat
            if guest.patience <= 0:
                self._dismiss(guest)
        idle = self._stillness.look() and self.computing
        self._idle = self._idle + self._beat if idle else 0.0
        if self._idle >= self._door.limit:
            self._end_hanging()
        if self._each_beat is not None:
            self._each_beat()

    def _hear_stop(self) -> None:
        self._stopped = True

    def _add(self, peer: _Peer) -> None:
        peer.connection.setblocking(False)
        self._peers.append(peer)
        self._selector.register(peer.connection, selectors.EVENT_READ, lambda: self._hear(peer))

    def _hear(self, peer: _Peer) -> None:
        try:
            words = peer.connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            words = b""
        if _END in words:  # rank 0 has said why
            os._exit(Interrupted.exit_code)
        if _LEAVING in words:
            self._forget(peer)
            self._peers.remove(peer)
        elif words:
            peer.patience = self._door.limit
        elif self._each_beat is not None:
            self._forget(peer)
            self._peers.remove(peer)
            self.lost = True
        else:
            self._forget(peer)
            peer.closed, peer.patience = True, min(peer.patience, AFTER_CLOSE)

    def _forget(self, peer: _Peer | _Guest) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()

    def _accept(self) -> None:
        """Rank 0: somebody is at the door. Who says nothing is not waited for: the others must hear this rank."""
        assert self._listener is not None
        with contextlib.suppress(OSError):
            guest = _Guest(self._listener.accept()[0])
            self._guests.append(guest)
            self._selector.register(guest.connection, selectors.EVENT_READ, lambda: self._greet(guest))
            if len(self._guests) > len(self._hosts) + STRANGERS:
                self._dismiss(self._guests[0])

    def _greet(self, guest: _Guest) -> None:
        """Rank 0: let a rank in that knows the token, and tell it the token's other half."""
        words = b""
        with contextlib.suppress(OSError):
            words = guest.connection.recv(_HELLO.size - len(guest.words))
        guest.words += words
        if words and len(guest.words) < _HELLO.size:
            return
        token, rank = _HELLO.unpack(guest.words.ljust(_HELLO.size, b"\0"))
        if secrets.compare_digest(token, self._door.token) and 0 < rank < len(self._hosts):
            self._guests.remove(guest)
            self._selector.unregister(guest.connection)
            peer = _Peer(rank, guest.connection, self._door.limit)
            self._add(peer)
            peer.say(_answer(token))
        else:
            self._dismiss(guest)

    def _dismiss(self, guest: _Guest) -> None:
        self._guests.remove(guest)
        self._forget(guest)

    def _connect(self) -> None:
        """Find rank 0, and surely this world's: machines may have the same private address.

        Where nothing leads to it (a firewall, most likely) this rank has no deadline, and says so with -v.
        """
        for address in (*(["127.0.0.1"] if self._near else []), *self._door.addresses):
            with contextlib.suppress(OSError), contextlib.ExitStack() as unless_found:
                connection = socket.create_connection((address, self._door.port), CONNECTING)
                unless_found.enter_context(connection)
                connection.sendall(_HELLO.pack(self._door.token, self._rank))
                expected = _answer(self._door.token)
                if connection.recv(len(expected), socket.MSG_WAITALL) == expected:
                    unless_found.pop_all()
                    self._add(_Peer(0, connection, self._door.limit))
                    return
        log.warning("[%d] no connection to rank 0 at %s; nothing ends this rank if that one falls silent",
                    self._rank, self._door.addresses)  # fmt: skip

    def _end(self, lost: _Peer) -> None:
        """Say who is lost, and end this process; rank 0 ends all."""
        if self._rank:
            time.sleep(0.1 * min(self._rank, 10))  # one of those who lost rank 0 is enough to say so
        where = f"Rank {lost.rank} on {self._hosts[lost.rank]}"
        what = (
            f"{where} is gone"
            if lost.closed
            else f"{where} has not been heard of for {self._door.limit:g} s: it is stopped, its machine is gone, "
            "or the network is cut"
        )
        self._say(what)
        for peer in self._peers:
            peer.say(_END)
        os._exit(Interrupted.exit_code)

    def _end_hanging(self) -> None:
        """Say that this rank gets nowhere, and end it."""
        self._say(
            f"This rank has neither computed, nor read, nor waited for others for {self._door.limit:g} s: it hangs"
        )
        if self._each_beat is not None:  # the others go on without one that is killed
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(Interrupted.exit_code)

    def _say(self, what: str) -> None:
        speaker = f"[{self._rank}@{self._hosts[self._rank]}]" if self._rank else "mpillm:"
        sys.stderr.write(f"{speaker} {what}; the same command goes on from here.\n")
        sys.stderr.flush()


def _answer(token: bytes) -> bytes:
    return token[::-1]
