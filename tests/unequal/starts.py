"""Starts of `rank.py` under either MPI, here or on hosts, with `launch` or without; and what is left of them."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import psutil

from tests.chaos.starts import stretched
from tests.cluster.hosts import Hosts
from tests.conftest import Mpi, run_bounded
from tests.unequal.drawing import settings_of
from tests.unequal.rank import Death, Plan

PROGRAM = Path(__file__).with_name("rank.py")
LIMIT = 200.0  # seconds of a start
LINGER = 10.0  # seconds in which processes end behind mpiexec
BUGS = ("Traceback", "has a bug", "WireError", "AssertionError")  # what nothing may say


class Fault(Exception):
    """A run that did not go as it must."""


class Drawn:
    """The ranks of a run, where they are, and what happens to them."""

    def __init__(self, mpi: Mpi, folder: Path, seed: str, common: Path, up: Hosts | None) -> None:
        """`common` has the model; `up` are four hosts, of which the run may take some."""
        self.mpi, self.folder, self.seed, self.draw = mpi, folder, seed, random.Random(seed)
        self.model = common / "model"
        self.hosts = up if self.draw.random() < 0.35 else None
        self.ranks = self.draw.choice((2, 3, 4, 4, 6, 8, 8))
        self.names = [socket.gethostname()]
        if self.hosts is not None:
            self.names = [f"{self.hosts.prefix}{number}" for number in self.hosts.numbers]
            self.names = self.names[: self.draw.choice((2, len(self.names)))]
            self.ranks = max(self.ranks // len(self.names), 1) * len(self.names)
        self.deaths = list[Death]()
        self.log = folder / "log"
        self.launched = False  # by `launch`

    def plan(self, deaths: list[Death]) -> None:
        """Let these deaths come, and draw what else makes the ranks differ."""
        draw, self.deaths = self.draw, deaths
        slow = draw.randrange(self.ranks) if draw.random() < 0.3 else None
        made = Plan(self.seed, deaths, slow, moves=draw.random() < 0.3)
        (self.folder / "plan.json").write_bytes(msgspec.json.encode(made))
        for number in range(len(deaths)):
            (self.folder / f"death-{number}").touch()

    @property
    def died(self) -> int:
        """How many deaths have come."""
        return len(list(self.folder.glob("died-*")))

    @property
    def after(self) -> float:
        """Seconds since the last death; 0 without one."""
        times = [one.stat().st_mtime for one in self.folder.glob("died-*")]
        return time.time() - max(times) if times else 0.0

    def settings(self, served: bool = False) -> list[str]:
        """New settings for these ranks."""
        return settings_of(self.draw, self.ranks, self.names, self.model, self.folder, served)

    def words(self, ulfm: bool = False) -> list[str | Path]:
        """The command up to the words of mpillm."""
        ours: list[str | Path] = [sys.executable, PROGRAM, self.folder, "mpillm"]
        hosts, hostfile = self.hosts, self.folder / "hosts"
        if hosts is not None:
            form = "{}:{}\n" if self.mpi.name == "mpich" else "{} slots={}\n"
            slots, addresses = self.ranks // len(self.names), hosts.addresses[: len(self.names)]
            hostfile.write_text("".join(form.format(address, slots) for address in addresses))
        if self.launched:
            if hosts is None:
                return [*ours, "launch", "-n", str(self.ranks)]
            options = _without_agent(hosts.launcher(self.mpi, hostfile)[1:])
            return [
                *ours, "launch", "--hostfile", hostfile, "--agent", hosts.agent,
                *(f"--mpi-option={word}" for word in options),
            ]  # fmt: skip
        first = [self.mpi.mpiexec] if hosts is None else hosts.launcher(self.mpi, hostfile)
        passed = ["-x", "MPILLM_DEADLINE"] if hosts is not None and self.mpi.name == "openmpi" else []
        return [*first, *passed, *(["--with-ft", "ulfm"] if ulfm else []), "-n", str(self.ranks), *ours]

    @contextlib.contextmanager
    def started(self, words: Sequence[str | Path]) -> Iterator[subprocess.Popen[bytes]]:
        """A start; at the end of the block nothing is left of it."""
        deadline, cache = f"{stretched(6.0):.1f}", str(self.folder / "cache")
        env = self.mpi.environment(MPILLM_DEADLINE=deadline, MPILLM_CACHE=cache)
        if self.hosts is not None:
            kept = ("HOME", "PATH", "PYTHONPATH", "MPILLM_DEADLINE", "MPILLM_CACHE", *self.mpi.env)
            lan = {"UCX_TLS": "tcp,self"} if self.mpi.name == "mpich" else {}
            words = self.hosts.on_first(list(words), {name: env[name] for name in kept} | lan)
        with self.log.open("wb") as log:
            log.write((" ".join(map(str, words)) + "\n").encode())
            log.flush()
            launcher = subprocess.Popen(
                [str(word) for word in words], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        try:
            yield launcher
        finally:
            for process in (launcher, *self.left()):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            launcher.wait()

    def said(self) -> str:
        """What the start has said; Fault if it tells of a bug."""
        text = self.log.read_text(errors="replace")
        for word in BUGS:
            if word in text:
                raise Fault(f"said {word}")
        return text

    def wait(self, launcher: subprocess.Popen[bytes], limit: float = LIMIT) -> int:
        """The exit code, when the start and all of its processes have ended; Fault if they do not."""
        begun = time.monotonic()
        while launcher.poll() is None:
            time.sleep(0.05)
            if time.monotonic() - begun > stretched(limit):
                raise Fault(f"hangs: {self.stacks()}")
        until = time.monotonic() + stretched(LINGER)
        while (left := list(self.left())) and time.monotonic() < until:
            time.sleep(0.1)
        if left and all(death.signal == "SIGKILL" for death in self.deaths):
            raise Fault(f"left behind: {self.stacks()}")
        return launcher.returncode

    def left(self) -> Iterator[psutil.Process]:
        """The processes of the start."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self.folder) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    yield process

    def ranks_there(self) -> list[psutil.Process]:
        """The processes of the ranks."""
        found = []
        for process in self.left():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if "python" in words[0] and "launch" not in words:
                    found.append(process)
        return found

    def stacks(self) -> list[str]:
        """Write the stacks of all processes into the folder; their files."""
        for process in self.left():
            with contextlib.suppress(psutil.Error, OSError):
                process.send_signal(signal.SIGCONT)
                dumped = run_bounded(["py-spy", "dump", "--pid", str(process.pid)], 60)
                (self.folder / f"stack-{process.pid}").write_text(dumped.stdout + dumped.stderr)
        return [str(path) for path in sorted(self.folder.glob("stack-*"))]


def _without_agent(options: Sequence[str | Path]) -> list[str]:
    """The options of `Hosts.launcher` that `launch` does not give itself."""
    kept, given = list[str](), ("-f", "--hostfile", "-launcher", "-launcher-exec")
    words = iter(map(str, options))
    for word in words:
        name = next(words) if word == "--prtemca" else ""
        if word in given or name == "plm_ssh_agent":
            next(words)
        else:
            kept += [word, name] if name else [word]
    return kept
