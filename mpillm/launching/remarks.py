"""Handle the output of mpiexec during one start: show the ranks' lines at once, keep remarks of mpiexec and ssh.

Their banners tell a user little, and would stand below the sentence that says what to do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import selectors
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

KEPT = 200  # lines of remarks
_RULE = re.compile(r"([-=])\1{40,}$")  # the first and the last line of a banner of Open MPI or MPICH
_REMARK = re.compile(
    r"\[(mpiexec|proxy:\d+)@|YOUR APPLICATION TERMINATED WITH |This typically refers to a problem with your |"
    r"Please see the FAQ page for |Abort\(\d+\) on node .*: application called MPI_Abort|"  # these are MPICH's
    r"\[[^\s\]]+:\d+\] (\[.+?\] )?(\w+ ERROR: |plm:|UNSUPPORTED DAEMON)|NBC_Progress: |"  # Open MPI's
    r"\[[^\s\]]+:\d+\] \*\*\* +(An error occurred in |reported by process |on |Unknown error|MPI_|and MPI will )|"
    r"\[\d+\.\d+\] \[\S+ *:\d+\] +\S+ +UCX +WARN |\[(warn|err)\] |"  # UCX's, libevent's
    r"ssh: |client_loop: |Connection (to|closed|reset) |Timeout, server |Host key verification failed"
)
_ENDED = re.compile(
    r"^(-{41,}\n)(MPI_ABORT was invoked|\w+ detected that one or more).*?\1", re.DOTALL | re.MULTILINE
)
_RANK = re.compile(r"\s*mpillm: ")  # how a rank's sentence begins, which may come in the middle of a banner
# What tells which host was lost, and by which signal; a rank that ends with an exit code has said why.
_CAUSES = (
    (
        r"lost communication with a remote daemon.*?Remote daemon:[^\n]* on node (\S+)",
        "mpiexec lost its daemon on {}",
    ),
    (
        r"A daemon failed to report back.*?Remote host:\s+(\S+)",
        "mpiexec could not start its daemon on {}, or lost it",
    ),
    (r"RUNNING AT (\S+)\n=\s+EXIT CODE: ([4-9]|[1-5]\d)\n", "a rank on {} was ended by {}"),
    (
        r"process rank \d+ with PID \d+ on node\s+(\S+) exited on\s+signal (\d+)",
        "a rank on {} was ended by {}",
    ),
    (
        r"peer process has unexpectedly disconnected.*?Peer host:\s+(\S+)",
        "a rank on {} was lost, or the connection to it",
    ),
    (r"\*\*\* An error occurred in Socket closed", "a rank was lost, or the connection to it"),
    (r"(ssh: connect to host [^\n]+)", "{}"),
    (r"Connection to (\S+) closed by remote host", "the connection to {} was closed"),
    # MPICH does not say which.
    (r"\[mpiexec@\S+\] control_cb .*assert \(!closed\) failed", "mpiexec lost its daemon on a host"),
)


class Remarks:
    """Listens to mpiexec during one start."""

    def __init__(self, out: Callable[[str], None], error: Callable[[str], None]) -> None:
        """`out` and `error` show a line to the user."""
        self._out, self._error = out, error
        self._selector = selectors.DefaultSelector()
        self._kept: deque[str] = deque(maxlen=KEPT)
        self.waits = False  # whether mpiexec was ended because it waited for hosts that are lost

    @contextlib.contextmanager
    def pipes(self) -> Iterator[tuple[int, int]]:
        """The stdout and stderr for mpiexec; this process does not need them after the block.

        They are one pipe if both streams are shown in one place, for two would lose the order of lines.
        """
        out = self._pipe(self._out)
        error = out if os.path.samestat(os.fstat(1), os.fstat(2)) else self._pipe(self._error)
        try:
            yield out, error
        finally:
            for descriptor in {out, error}:
                os.close(descriptor)

    def _pipe(self, show: Callable[[str], None]) -> int:
        read, write = os.pipe()
        os.set_blocking(read, False)
        self._selector.register(read, selectors.EVENT_READ, _Lines(show, self._keep))
        return write

    def _keep(self, line: str) -> None:
        log.info("%s", line)
        self._kept.append(line)

    def listen(self, seconds: float) -> None:
        """Take what is written within `seconds` seconds."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if not self._selector.get_map():
                time.sleep(left)
            for key, _ in self._selector.select(left):
                self._read(key)

    def close(self) -> None:
        """Take what is left when mpiexec has ended; another process may still have the pipe."""
        for key in list(self._selector.get_map().values()):
            while self._read(key):
                pass
            key.data.take(b"")
        for key in list(self._selector.get_map().values()):
            os.close(key.fd)
        self._selector.close()

    def _read(self, key: selectors.SelectorKey) -> bool:
        """Read once; whether there was anything."""
        try:
            data = os.read(key.fd, 1 << 16)
        except BlockingIOError:
            return False
        key.data.take(data)
        if not data:
            self._selector.unregister(key.fd)
            os.close(key.fd)
        return bool(data)

    def cause(self) -> str | None:
        """Return the host or rank that was lost, if a remark names it."""
        text = "".join(f"{line}\n" for line in self._kept)
        for pattern, sentence in _CAUSES:
            if found := re.search(pattern, text, re.DOTALL):
                place, *number = found.groups() or ("",)
                return sentence.format(place.strip(), *(signal.Signals(int(code)).name for code in number))
        return "mpiexec waited for a host that was lost" if self.waits else None

    def show(self) -> None:
        """Show the remarks to a user who must find the cause; not that a rank has ended, which has said why."""
        for line in _ENDED.sub("", "".join(f"{line}\n" for line in self._kept)).splitlines():
            self._error(line)


class _Lines:
    """The lines of one stream, each shown or kept."""

    def __init__(self, show: Callable[[str], None], keep: Callable[[str], None]) -> None:
        self._show, self._keep = show, keep
        self._begun, self._banner = b"", False  # the beginning of a line; whether a banner has begun

    def take(self, data: bytes) -> None:
        """Take what was read: nothing at the end."""
        *lines, self._begun = (self._begun + data).split(b"\n")
        if not data and self._begun:
            lines, self._begun = [self._begun], b""
        for line in lines:
            text = line.decode("utf-8", "surrogateescape").lstrip("\0").rstrip("\r\0 ")
            (self._keep if self._is_remark(text) else self._show)(text)

    def _is_remark(self, line: str) -> bool:
        if _RANK.match(line):
            return False
        if _RULE.match(line):
            self._banner = not self._banner
            return True
        return self._banner or not line or _REMARK.match(line) is not None
