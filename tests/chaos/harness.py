"""Jobs that are disturbed at random moments, and started again with the same command until they are done.

What must hold afterwards: every request is answered once, in the bytes of an undisturbed run; no start hung for longer
than PATIENCE after it was disturbed; and no process outlived its mpiexec.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from mpillm.errors import JobError
from mpillm.job.journal import finished
from tests.cluster import hosts as tools
from tests.cluster.hosts import NETWORK, Hosts
from tests.conftest import Mpi, clean_environment, run_bounded
from tests.e2e.jobs import CHAT, command, mixed_lines, write_lines

RANKS = 4
REQUESTS = 200
PATIENCE = 30.0  # seconds from a disturbance to the end of all processes
DEADLINE = 2.0  # MPILLM_DEADLINE of the disturbed runs; while ranks start it is six times that
WEIGHTS = 0.8  # of a rank's share of the weights that the variation with less memory may keep
KV_BLOCKS = 24  # of the variation with a small KV cache: sequences give way
LATEST = 0.9  # disturbances come between the start and this part of the length of an undisturbed run
RESULTS = ("results.jsonl", "results.h5")
CUT = "cable cut"  # the kind that needs hosts of its own

# What else a job may ask for: none of it changes a byte. Small batches, so that there is time to disturb it.
VARIATIONS = (
    ("batch.max_num_seqs=4",),
    ("batch.max_num_seqs=4", "job.checkpoint_tokens=1"),
    ("batch.max_num_seqs=3", "job.checkpoint_tokens=5", "memory.kv={kv}"),
    ("batch.max_num_seqs=5", "job.checkpoint_tokens=0", "batch.max_num_batched_tokens=16"),
    ("batch.max_num_seqs=4", "job.checkpoint_tokens=3", "memory.weights={weights}"),
)


class ChaosError(AssertionError):
    """Something that must not happen; says the seed that makes it happen again, more or less."""


@dataclass
class Counts:
    """What has been done to the job."""

    seed: int
    disturbances: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)  # of disturbed runs
    starts: int = 0
    rounds: Counter[str] = field(
        default_factory=Counter
    )  # jobs that came to their end, by what they asked for
    longest: float = 0.0  # seconds from a disturbance to the end of all processes

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.disturbances.items()))
        codes = ", ".join(f"{count} x {code}" for code, count in sorted(self.codes.items()))
        return (
            f"seed {self.seed}: {self.disturbances.total()} disturbances ({kinds}) in {self.starts} starts of "
            f"{self.rounds.total()} jobs of {REQUESTS} requests on {RANKS} ranks; 0 lost, 0 twice, all bytes the same; "
            f"longest way to the end {self.longest:.1f} s; exit codes {codes}"
        )


@dataclass(frozen=True)
class Job:
    """What the same command says, again and again."""

    model: Path
    output: Path
    settings: tuple[str, ...]


class Chaos:
    """The jobs, and those who disturb them."""

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
        self._packed = folder / "packed" / CHAT.name
        self._sizes = {"weights": 0, "kv": 0}
        self._hosts: Hosts | None = None
        self._kinds: dict[str, Callable[[subprocess.Popen[bytes]], object]] = {
            "rank killed": lambda launcher: self._signal_one(launcher, signal.SIGKILL),
            "rank stopped": lambda launcher: self._signal_one(launcher, signal.SIGSTOP),
            "all ranks killed": self._kill_all,
            "mpiexec killed": lambda launcher: launcher.kill(),
            "warned": lambda launcher: launcher.send_signal(signal.SIGUSR1),
            "told to end": lambda launcher: launcher.send_signal(signal.SIGTERM),
        }

    def run(self, disturbances: int) -> Counts:
        """Disturb so many times; ChaosError says what has gone wrong."""
        with self._small_disk(), self._network():
            length = self._undisturbed()
            job = self._next_job()
            while self.counts.disturbances.total() < disturbances:
                self._disturbed(job, self._random.uniform(0, LATEST * length))
                if finished(job.output) is not None:
                    self._check(job)
                    job = self._next_job()
            while finished(job.output) is None:
                self._end(self._start(job, self._launcher()), job.output)
            self._check(job)
        return self.counts

    def _undisturbed(self) -> float:
        """Run both models' jobs without disturbing them; the seconds that one takes."""
        words = [sys.executable, "-m", "mpillm", "pack", CHAT, self._packed, "--weights", "f32"]
        assert run_bounded(words, env=clean_environment()).returncode == 0
        seconds = []
        for model in (self._packed, CHAT):
            begun = time.monotonic()
            job = Job(model, self._reference(model), VARIATIONS[0])
            assert self._start(job, self._launcher()).wait() == 0, (self._folder / "log").read_text()
            seconds.append(time.monotonic() - begun)
        ranks = json.loads((self._reference(CHAT) / "report.json").read_text())["ranks"]
        self._sizes["weights"] = int(WEIGHTS * max(rank["weights"]["share"] for rank in ranks))
        self._sizes["kv"] = KV_BLOCKS * max(rank["kv"]["bytes"] // rank["kv"]["blocks"] for rank in ranks)
        return min(seconds)

    def _reference(self, model: Path) -> Path:
        return self._folder / f"undisturbed-{model.parent.name}"

    def _next_job(self) -> Job:
        """A new job: one of the models, in one of the variations, into a directory of its own."""
        number = self.counts.rounds.total()
        settings = tuple(setting.format(**self._sizes) for setting in self._random.choice(VARIATIONS))
        return Job(self._random.choice((CHAT, self._packed)), self._disk / str(number), settings)

    @contextlib.contextmanager
    def _network(self) -> Iterator[None]:
        """Two hosts whose cable can be cut, where this user may make them (Open MPI alone runs on them here)."""
        if self._mpi.name != "openmpi" or (reason := tools.missing()):
            self._say(
                f"no hosts can be made here ({reason}): no cable is cut" if reason else "no cable is cut"
            )
            yield
            return
        with Hosts(self._folder, 2).up() as self._hosts:
            self._kinds[CUT] = self._cut
            yield

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

    def _launcher(self, on_hosts: bool = False) -> list[str | Path]:
        """mpiexec: here, or from the first host with half of the ranks on each."""
        if not on_hosts:
            return [self._mpi.mpiexec, "-n", str(RANKS)]
        assert self._hosts is not None
        hostfile = self._folder / "hosts"
        hostfile.write_text("".join(f"{NETWORK}.{number} slots={RANKS // 2}\n" for number in (1, 2)))
        passed_on = ["-x", "MPILLM_DEADLINE", "-x", "PYTHONPATH"]
        return [*self._hosts.launcher(self._mpi, hostfile), *passed_on, "-n", str(RANKS)]

    def _start(self, job: Job, launcher: list[str | Path], on_hosts: bool = False) -> subprocess.Popen[bytes]:
        self.counts.starts += 1
        words = [*launcher, sys.executable, *command(self._input, job.output, *job.settings, model=job.model)]
        env = self._mpi.environment(MPILLM_DEADLINE=str(DEADLINE))
        if on_hosts and self._hosts:
            kept = ("HOME", "PATH", "PYTHONPATH", "MPILLM_DEADLINE", *self._mpi.env)
            words = self._hosts.on_first(words, {name: env[name] for name in kept})
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(
                [str(word) for word in words],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _disturbed(self, job: Job, after: float) -> None:
        kind = self._next_kind()
        launcher = self._start(job, self._launcher(kind == CUT), kind == CUT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(after)
        if launcher.poll() is None:
            self.counts.disturbances[kind] += 1
            self._say(f"{self.counts.disturbances.total()}: {kind} after {after:.1f} s")
            self._kinds[kind](launcher)
        else:
            self._deck.append(kind)
        self._end(launcher, job.output, kind == CUT)
        self.counts.codes[launcher.returncode] += 1
        (self._disk / "filler").unlink(missing_ok=True)

    def _next_kind(self) -> str:
        """Each kind once, in some order, before any comes again."""
        if not self._deck:
            self._deck = self._random.sample(sorted(self._kinds), len(self._kinds))
        return self._deck.pop()

    def _end(self, launcher: subprocess.Popen[bytes], output: Path, on_hosts: bool = False) -> None:
        """Wait for mpiexec and all its ranks. Behind a cut cable mpiexec may wait for ever; its ranks may not."""
        begun = time.monotonic()
        until = begun + PATIENCE
        while (left := self._left(output)) or (launcher.poll() is None and not on_hosts):
            if on_hosts and all(_is_launcher(process) for process in left):
                break
            if time.monotonic() > until:
                for process in (launcher, *left):
                    process.kill()
                launcher.wait()
                # Else a rank was stopped on its last few lines: nothing is lost by that.
                if finished(output) is None:
                    raise self._wrong(f"{left} still there {PATIENCE:.0f} s after a disturbance")
            time.sleep(0.05)
        self.counts.longest = max(self.counts.longest, time.monotonic() - begun)
        if on_hosts:
            self._restore()
        if launcher.wait() == JobError.exit_code:
            raise self._wrong("the job was refused")

    def _restore(self) -> None:
        """What is left of MPI itself on the hosts is ended, as its owner would, and the cable is mended."""
        assert self._hosts is not None
        for number in self._hosts.numbers:
            found = run_bounded(["ip", "netns", "pids", f"{self._hosts.prefix}{number}"]).stdout.split()
            for pid in map(int, found):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        run_bounded(["ip", "-n", self._hosts.switch, "link", "set", "port2", "up"])

    def _cut(self, _launcher: subprocess.Popen[bytes]) -> None:
        assert self._hosts is not None
        run_bounded(["ip", "-n", self._hosts.switch, "link", "set", "port2", "down"])

    def _left(self, output: Path) -> list[psutil.Process]:
        """Processes of this run, wherever they now belong to."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(output) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _check(self, job: Job) -> None:
        self.counts.rounds[" ".join([job.model.parent.name, *job.settings])] += 1
        for name in RESULTS:
            if (job.output / name).read_bytes() != (self._reference(job.model) / name).read_bytes():
                raise self._wrong(f"{job.output / name} differs from the undisturbed run's ({job.settings})")
        self._say(
            f"{job.output.name}: {REQUESTS} requests, the same bytes ({job.model.parent.name}, {job.settings})"
        )
        shutil.rmtree(job.output)

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


def _is_launcher(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return not _is_rank(process)
    return True


def _is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return "mpillm" in words and "-m" in words and "python" in words[0]
    return False
