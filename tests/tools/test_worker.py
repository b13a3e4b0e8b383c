"""A worker of Distributed-Llama's roots: a root made here, ones that are none, and the real one where it is built.

MPILLM_TEST_DLLAMA names the program of the real one.
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpillm.errors import JobError, MpillmError
from mpillm.tools.worker.graph import read_graph
from mpillm.tools.worker.link import ACKNOWLEDGED, Link, RootLostError, StrangeRootError, close, listen, meet
from mpillm.tools.worker.worker import work
from tests.conftest import HANGS
from tests.model.test_dllama_peer import PROGRAM, write

ACK = struct.pack("<I", ACKNOWLEDGED)
F32 = 0


class Root:
    """The messages of a root with one worker; `peer` is the worker's result."""

    def __init__(self, link: Link, worker: Any) -> None:
        self.link, self.worker = link, worker

    def numbers(self, layout: str, *values: Any) -> None:
        self.link.write(struct.pack(f"<{layout}", *values))

    def string(self, text: str) -> None:
        data = text.encode() + b"\0"
        self.link.write(struct.pack("<I", len(data)) + data)

    def size(self, z: int, y: int, x: int, kind: int = F32) -> None:
        self.numbers("iIIIQQQ", kind, z, y, x, z * y * x, 4 * z * y * x, 4 * y * x)

    def hello(self) -> None:
        self.numbers("II", 1, 0)
        self.link.await_acknowledgement()
        self.link.write(ACK)

    def graph(self, code: int, weight: tuple[int, int], config: bytes) -> None:
        """Rows of 4 from the root, one operation on them, and the worker's half of a row back to the root."""
        self.link.write(ACK)
        self.numbers("III", 2, 2, 3)  # at most two rows, two nodes, pipes: positions, rows, answers
        for width in (1, 4, 6):
            self.size(1, 2, width)
            self.string("pipe")
        self.numbers("II", 1, 0)
        self.link.await_acknowledgement()
        self.link.write(ACK)
        self.numbers("III", 1, 0, 2)
        self.numbers("IIIi", 1, 0, 1, 0)  # a segment without operations: the rows come
        self.numbers("IIIi", 1, 1, 2, 2)  # one with an operation: answers go
        self.numbers("iI", code, 7)
        self.size(1, *weight)
        self.numbers("I", len(config))
        self.string("product")
        self.numbers("iIi", 0, 1, 1)  # from the pipe of rows
        self.numbers("iIi", 0, 2, 2)  # to this node's slice of the answers
        self.link.write(config)
        self.link.await_acknowledgement()

    def weights(self, values: np.ndarray, name: str = "product") -> None:
        self.string(name)
        self.numbers("IQQ", 7, 0, values.nbytes)
        self.link.write(values.tobytes())


@contextlib.contextmanager
def root() -> Iterator[Root]:
    """A root whose worker, in another thread, goes through all that a worker does."""
    with listen("127.0.0.1", 0) as server, ThreadPoolExecutor(1) as pool:
        server.settimeout(HANGS)

        def worker() -> int:
            links = meet(server)
            try:
                return work(read_graph(links[0]), links, 1)
            finally:
                close(links)

        future = pool.submit(worker)
        link = Link(socket.create_connection(server.getsockname(), timeout=HANGS), "The worker")
        with contextlib.closing(link):
            yield Root(link, future)


def test_a_root_and_its_steps() -> None:
    weights = np.arange(12, dtype=np.float32).reshape(3, 4)
    with root() as made:
        made.hello()
        made.graph(5, (4, 3), struct.pack("<III", 0, 0, 0))
        made.weights(weights)
        made.numbers("I", 0)
        made.link.await_acknowledgement()
        for position, rows in ((0, 2), (2, 1)):
            x = np.random.default_rng(position).standard_normal((rows, 4)).astype(np.float32)
            made.numbers("II", position, rows)
            made.link.write(x.tobytes())
            found = np.frombuffer(made.link.read(12 * rows), np.float32).reshape(rows, 3)
            np.testing.assert_allclose(found, x @ weights.T, rtol=1e-5, atol=1e-5)
        made.numbers("II", 0, 0)
        assert made.worker.result(30) == 2


def lost(made: Root) -> None:
    made.hello()
    made.link.close()


def lost_between_steps(made: Root) -> None:
    made.hello()
    made.graph(5, (4, 3), struct.pack("<III", 0, 0, 0))
    made.weights(np.zeros((3, 4), np.float32))
    made.numbers("I", 0)
    made.numbers("II", 0, 2)
    made.link.close()


def web_browser(made: Root) -> None:
    made.link.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")


def other_version(made: Root) -> None:
    made.hello()
    made.numbers("I", 5)


def unknown_operation(made: Root) -> None:
    made.hello()
    made.graph(40, (4, 3), b"")
    made.numbers("I", 0)


def unknown_type(made: Root) -> None:
    made.hello()
    made.link.write(ACK)
    made.numbers("III", 2, 2, 1)
    made.size(1, 2, 4, kind=9)


def missing_config(made: Root) -> None:
    made.hello()
    made.graph(5, (4, 3), b"")
    made.numbers("I", 0)


def other_weights(made: Root) -> None:
    made.hello()
    made.graph(5, (4, 3), bytes(12))
    made.weights(np.zeros(3, np.float32), "other")


def too_many_weights(made: Root) -> None:
    made.hello()
    made.graph(5, (4, 3), bytes(12))
    made.weights(np.zeros(13, np.float32))


def too_many_rows(made: Root) -> None:
    made.hello()
    made.graph(5, (4, 3), bytes(12))
    made.numbers("I", 0)
    made.numbers("II", 0, 3)


# The latter if the worker has sent what a root that goes has not read.
GONE = r"has closed its connection|The connection to .* broke \((Connection reset by peer|Broken pipe)\)"
WRONG: list[tuple[Any, type[MpillmError], str]] = [
    (lost, RootLostError, GONE),
    (lost_between_steps, RootLostError, GONE),
    (web_browser, StrangeRootError, "it is not a root of Distributed-Llama"),
    (other_version, StrangeRootError, "it is of another version"),
    (unknown_operation, StrangeRootError, r"the operation 40 \(product\), which is unknown"),
    (unknown_type, StrangeRootError, "uses the float type 9"),
    (missing_config, StrangeRootError, "has product, which is not as it must be"),
    (other_weights, StrangeRootError, "sent weights of 'other' 7 that it did not describe"),
    (too_many_weights, StrangeRootError, "sent weights of 'product' 7 that it did not describe"),
    (too_many_rows, StrangeRootError, "asks for 3 rows, of 2"),
]


@pytest.mark.parametrize(("act", "kind", "words"), WRONG, ids=[case[0].__name__ for case in WRONG])
def test_roots_that_vanish_or_are_of_another_version(act: Any, kind: type[MpillmError], words: str) -> None:
    with root() as made:
        act(made)
        with pytest.raises(kind, match=words):
            made.worker.result(30)


def test_an_address_that_cannot_be_had() -> None:
    with (
        listen("127.0.0.1", 0) as server,
        pytest.raises(JobError, match="cannot be listened on: Address already in use; give another"),
    ):
        listen("127.0.0.1", server.getsockname()[1])
    with pytest.raises(JobError, match="cannot be listened on"):
        listen("127.0.0.1", 70000)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def workers(kinds: str, folder: Path) -> Iterator[list[str]]:
    """Workers in their order, "o" for ours and "t" for theirs; their addresses."""
    ports = free_ports(len(kinds))
    started = []
    try:
        for kind, port in zip(kinds, ports, strict=True):
            program = [sys.executable, "-m", "mpillm"] if kind == "o" else [PROGRAM]
            with (folder / f"{port}.log").open("w") as log:
                command = [*program, "worker", "--host", "127.0.0.1", "--port", str(port), "--nthreads", "1"]
                started.append(subprocess.Popen(command, stdout=log, stderr=log))
        for port in ports:
            while f":{port:04X} 00000000:0000 0A" not in Path("/proc/net/tcp").read_text():
                assert all(one.poll() is None for one in started)
                time.sleep(0.05)
        yield [f"127.0.0.1:{port}" for port in ports]
    finally:
        for one in started:
            one.send_signal(signal.SIGTERM)
            one.wait()


def said(model: Path, kind: str, kinds: str, folder: Path) -> str:
    """The letters that a real root prints with such workers."""
    with workers(kinds, folder) as addresses:
        command = [PROGRAM, "inference", "--model", str(model), "--tokenizer", str(model.with_suffix(".t"))]
        command += ["--prompt", "the quick brown fox jumps over", "--steps", "40", "--temperature", "0"]
        command += ["--buffer-float-type", "f32" if kind == "f32" else "q80", "--nthreads", "1", "--workers"]
        done = subprocess.run([*command, *addresses], capture_output=True, timeout=HANGS, check=True)
    printed = done.stdout.decode("utf-8", "replace")
    return re.sub(r"[^A-Za-z ]", "", re.sub(r"🔶 Pred.*? kB \| ", "", printed[printed.index("🔶") :]))


@pytest.mark.skipif(not PROGRAM, reason="MPILLM_TEST_DLLAMA names no program of Distributed-Llama")
@pytest.mark.parametrize(
    ("architecture", "kind", "theirs", "ours"),
    [
        ("llama", "f32", "t", "o"),
        ("llama", "f32", "ttt", "oto"),
        ("qwen3", "f32", "ttt", "ooo"),
        ("llama", "q40", "ttt", "too"),
        ("qwen3_moe", "q40", "ttt", "ooo"),
    ],
)
def test_a_real_root_says_the_same(
    tmp_path: Path, architecture: str, kind: str, theirs: str, ours: str
) -> None:
    """With f32 to the end; with q40 for the first words, for sums are taken in another order."""
    model = write(tmp_path, architecture, kind)
    expected, found = (said(model, kind, kinds, tmp_path) for kinds in (theirs, ours))
    cut = expected.index("Evaluation") if kind == "f32" else 12
    assert len(set(expected[:cut])) > 5
    assert found[:cut] == expected[:cut]
