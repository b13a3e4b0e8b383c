"""A job that is disturbed at random moments, and started again with the same command until it is done.

What must hold afterwards: every request is answered once, in the bytes of an undisturbed run; no start hung for longer
than PATIENCE after it was disturbed; and no process outlived its mpiexec.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from mpillm.job.journal import finished
from tests.conftest import Mpi, run_bounded
from tests.e2e.jobs import command, mixed_lines, write_lines

RANKS = 4
REQUESTS = 200
PATIENCE = 30.0  # seconds from a disturbance to the end of all processes
DEADLINE = 2.0  # MPILLM_DEADLINE of the disturbed runs; while ranks start it is six times that
LATEST = 0.9  # disturbances come between the start and this part of the length of an undisturbed run
RESULTS = ("results.jsonl", "results.h5")


class ChaosError(AssertionError):
    """Something that must not happen; says the seed that makes it happen again, more or less."""


@dataclass
class Counts:
    """What has been done to the job."""

    seed: int
    disturbances: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)  # of disturbed runs
    starts: int = 0
    rounds: int = 0  # jobs that came to their end
    longest: float = 0.0  # seconds from a disturbance to the end of all processes

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.disturbances.items()))
        codes = ", ".join(f"{count} x {code}" for code, count in sorted(self.codes.items()))
        return (
            f"seed {self.seed}: {self.disturbances.total()} disturbances ({kinds}) in {self.starts} starts of "
            f"{self.rounds} jobs of {REQUESTS} requests on {RANKS} ranks; 0 lost, 0 twice, all bytes the same; "
            f"longest way to the end {self.longest:.1f} s; exit codes {codes}"
        )


class Chaos:
    """The job, and those who disturb it."""

    def __init__(
        self, mpi: Mpi, folder: Path, seed: int, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self._mpi, self._folder, self._say = mpi, folder, say
        self._random = random.Random(seed)
        self._deck: list[str] = []
        self.counts = Counts(seed)
        self._input = write_lines(folder / "in.jsonl", mixed_lines(REQUESTS, seed=5, tokens=30))
        self._disk = folder / "disk"
        self._disk.mkdir()
        self._kinds: dict[str, Callable[[subprocess.Popen[bytes]], object]] = {
            "rank killed": lambda launcher: self._signal_one(launcher, signal.SIGKILL),
            "rank stopped": lambda launcher: self._signal_one(launcher, signal.SIGSTOP),
            "all ranks killed": self._kill_all,
            "mpiexec killed": lambda launcher: launcher.kill(),
            "warned": lambda launcher: launcher.send_signal(signal.SIGUSR1),
        }

    def run(self, disturbances: int) -> Counts:
        """Disturb so many times; ChaosError says what has gone wrong."""
        with self._small_disk():
            begun = time.monotonic()
            self._start(self._folder / "undisturbed").wait()
            length = time.monotonic() - begun
            output = self._disk / "0"
            while self.counts.disturbances.total() < disturbances:
                self._disturbed(output, self._random.uniform(0, LATEST * length))
                if finished(output) is not None:
                    self._check(output)
                    output = self._disk / str(self.counts.rounds)
            while finished(output) is None:
                self._end(self._start(output), output)
            self._check(output)
        return self.counts

    @contextlib.contextmanager
    def _small_disk(self) -> Iterator[None]:
        """A disk that can be filled, where this user may mount one."""
        words = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", self._disk]
        if os.geteuid() or run_bounded(words).returncode:
            self._say("no tmpfs can be mounted here: disks are not filled")
            yield
            return
        self._kinds["disk full"] = self._fill_disk
        try:
            yield
        finally:
            run_bounded(["umount", "--lazy", self._disk])

    def _start(self, output: Path) -> subprocess.Popen[bytes]:
        self.counts.starts += 1
        words = self._mpi.command(RANKS, *command(self._input, output, "batch.max_num_seqs=4"))
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(
                [str(word) for word in words],
                env=self._mpi.environment(MPILLM_DEADLINE=str(DEADLINE)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _disturbed(self, output: Path, after: float) -> None:
        launcher = self._start(output)
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(after)
        if launcher.poll() is None:
            kind = self._next_kind()
            self.counts.disturbances[kind] += 1
            self._say(f"{self.counts.disturbances.total()}: {kind} after {after:.1f} s")
            self._kinds[kind](launcher)
        self._end(launcher, output)
        self.counts.codes[launcher.returncode] += 1
        (self._disk / "filler").unlink(missing_ok=True)

    def _next_kind(self) -> str:
        """Each kind once, in some order, before any comes again."""
        if not self._deck:
            self._deck = self._random.sample(sorted(self._kinds), len(self._kinds))
        return self._deck.pop()

    def _end(self, launcher: subprocess.Popen[bytes], output: Path) -> None:
        """Wait for mpiexec and all its ranks."""
        begun = time.monotonic()
        try:
            launcher.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            left = self._left(output)
            for process in (launcher, *left):
                process.kill()
            launcher.wait()
            if (
                finished(output) is None
            ):  # else a rank was stopped on its last few lines: nothing is lost by that
                raise self._wrong(f"no end {PATIENCE:.0f} s after a disturbance") from None
        until = begun + PATIENCE
        while left := self._left(output):
            if time.monotonic() > until:
                for process in left:
                    process.kill()
                raise self._wrong(f"processes were left behind: {left}")
            time.sleep(0.05)
        self.counts.longest = max(self.counts.longest, time.monotonic() - begun)

    def _left(self, output: Path) -> list[psutil.Process]:
        """Processes of this run, wherever they now belong to."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(output) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _check(self, output: Path) -> None:
        self.counts.rounds += 1
        for name in RESULTS:
            if (output / name).read_bytes() != (self._folder / "undisturbed" / name).read_bytes():
                raise self._wrong(f"{output / name} differs from the undisturbed run's")
        self._say(f"{output.name}: {REQUESTS} requests, the same bytes")

    def _wrong(self, what: str) -> ChaosError:
        log = (self._folder / "log").read_text(errors="replace")[-3000:]
        return ChaosError(f"{what} (seed {self.counts.seed}, {dict(self.counts.disturbances)})\n{log}")

    def _ranks(self, launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            below = psutil.Process(launcher.pid).children(recursive=True)
            return [process for process in below if _is_rank(process)]
        return []

    def _signal_one(self, launcher: subprocess.Popen[bytes], number: signal.Signals) -> None:
        if ranks := self._ranks(launcher):
            with contextlib.suppress(psutil.Error):
                self._random.choice(ranks).send_signal(number)

    def _kill_all(self, launcher: subprocess.Popen[bytes]) -> None:
        for rank in self._ranks(launcher):
            with contextlib.suppress(psutil.Error):
                rank.kill()

    def _fill_disk(self, _launcher: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(OSError), (self._disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))


def _is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return "mpillm" in words and "-m" in words and "python" in words[0]
    return False
