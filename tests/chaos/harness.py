"""Jobs that are disturbed at random moments, and started again with the same command until they are done.

What must hold afterwards: every request is answered once, in the bytes of an undisturbed run; no start hung for longer
than PATIENCE after it was disturbed; and no process outlived its mpiexec. Half of the starts are made so that ranks may
die in them (Open MPI's ULFM): such a start is disturbed again and again, until it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from mpillm.comm.running import CRASHED
from mpillm.errors import JobError
from mpillm.store.journal import finished
from mpillm.store.output import JOURNAL
from tests.cluster import hosts as tools
from tests.cluster.hosts import NETWORK, Hosts
from tests.conftest import Mpi, clean_environment, run_bounded
from tests.e2e.jobs import CHAT, command, mixed_lines, write_lines

RANKS = 4
REQUESTS = 200
PATIENCE = 30.0  # seconds from a disturbance to the end of all processes
AFTER_THE_END = (
    8.0  # the same, once all results are written: a rank that is stopped then stays until it is ended
)
DEADLINE = 2.0  # MPILLM_DEADLINE of the disturbed runs; while ranks start it is six times that
WITH_ULFM = 4.0  # the same, where stopped ranks are to be seen and killed before
WEIGHTS = 0.8  # of a rank's share of the weights that the variation with less memory may keep
KV_BLOCKS = 24  # of the variation with a small KV cache: sequences give way
LATEST = 0.9  # disturbances come between the start and this part of the time that it would take undisturbed
EARLIER = 0.6  # the same where more may follow,
TWO_HOSTS = 1.8  # and where two hosts make it slower
WHILE_COMPUTING = 0.7  # so often starts with ULFM are disturbed first when they compute
AGAIN = 0.3  # the next ones come within this part of the time of computing
RESULTS = ("results.jsonl", "results.h5")
LOOK = 0.02  # seconds between two looks at what runs
SURELY_LATER = 1.0  # seconds after which what the journal gains was computed after the disturbance

CUT = "cable cut"  # the kind that needs hosts of its own
# Kinds that a start with ULFM goes on after, and how often each comes there for one of any other kind.
CARRIED = {"rank killed": 4, "two ranks killed": 3, "rank stopped": 2}

# What else a job may ask for: none of it changes a byte. Small batches, so that there is time to disturb it.
VARIATIONS = (
    ("batch.max_num_seqs=4",),
    ("batch.max_num_seqs=4", "job.checkpoint_tokens=1"),
    ("batch.max_num_seqs=3", "job.checkpoint_tokens=5", "memory.kv={kv}"),
    ("batch.max_num_seqs=5", "job.checkpoint_tokens=0", "batch.max_num_batched_tokens=16"),
    ("batch.max_num_seqs=4", "job.checkpoint_tokens=3", "memory.weights={weights}"),
)


class ChaosError(AssertionError):
    """The job cannot go on at all; says the seed that makes it happen again, more or less."""


@dataclass
class Counts:
    """What has been done to the jobs, and what came of it."""

    seed: int
    disturbances: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)  # of disturbed runs
    starts: int = 0
    jobs: int = 0  # that came to their end
    lost: int = 0  # requests without an answer
    twice: int = 0  # requests with several
    differing: int = 0  # result files that are not those of the undisturbed run
    orphans: int = 0  # processes that were still there PATIENCE seconds after a disturbance
    after_the_end: int = 0  # starts in which a rank was stopped when all was done, and stayed
    crashes: int = 0  # starts that ended in an error nobody foresaw
    longest: float = 0.0  # seconds from a disturbance until the run went on or all its processes had ended
    at_work_again: dict[str, list[float]] = field(
        default_factory=dict
    )  # seconds, by kind, where ranks may die

    @property
    def wrong(self) -> int:
        """How much there is that must not be."""
        return self.lost + self.twice + self.differing + self.orphans + self.crashes

    def __str__(self) -> str:
        codes = ", ".join(f"{count} x {code}" for code, count in sorted(self.codes.items()))
        lines = [f"{count:5d}  {kind}" for kind, count in sorted(self.disturbances.items())]
        for kind, seconds in sorted(self.at_work_again.items()):
            lines.append(
                f"       {kind}: at work again after {statistics.median(seconds):.2f} s (median of {len(seconds)}), "
                f"{max(seconds):.2f} s at most"
            )
        return "\n".join(
            [
                *lines,
                f"       {self.starts} starts of {self.jobs} jobs of {REQUESTS} requests on {RANKS} ranks; "
                f"exit codes {codes}; stopped after the end and left alone: {self.after_the_end}",
                f"seed {self.seed}: {self.disturbances.total()} disturbances, {self.lost} lost, {self.twice} twice, "
                f"{self.differing} differing, {self.orphans} orphans, {self.crashes} crashes, "
                f"longest silence {self.longest:.1f} s",
            ]
        )


@dataclass(frozen=True)
class Job:
    """What the same command says, again and again."""

    model: Path
    output: Path
    settings: tuple[str, ...]


@dataclass
class Start:
    """A start of a job."""

    launcher: subprocess.Popen[bytes]
    output: Path
    on_hosts: bool
    said_before: int  # bytes in the log
    gone: int = 0  # ranks that were killed or stopped in it
    since: float = 0.0  # when it was disturbed last


class Chaos:
    """The jobs, and those who disturb them."""

    def __init__(
        self, mpi: Mpi, folder: Path, seed: int, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self._mpi, self._folder, self._say = mpi, folder, say
        self._random = random.Random(seed)
        self._decks: dict[bool, list[str]] = {False: [], True: []}
        self.counts = Counts(seed)
        self._input = write_lines(folder / "in.jsonl", mixed_lines(REQUESTS, seed=5, tokens=30))
        self._log = folder / "log"
        self._disk = folder / "disk"
        self._disk.mkdir()
        self._packed = folder / "packed" / CHAT.name
        self._sizes = {"weights": 0, "kv": 0}
        self._starting = self._computing = 0.0  # seconds of an undisturbed run
        self._hosts: Hosts | None = None
        self._kinds: dict[str, Callable[[Start], object]] = {
            "rank killed": lambda start: self._signal(start, signal.SIGKILL, 1),
            "two ranks killed": lambda start: self._signal(start, signal.SIGKILL, 2),
            "rank stopped": lambda start: self._signal(start, signal.SIGSTOP, 1),
            "all ranks killed": lambda start: self._signal(start, signal.SIGKILL, RANKS),
            "mpiexec killed": lambda start: start.launcher.kill(),
            "warned": lambda start: start.launcher.send_signal(signal.SIGUSR1),
            "told to end": lambda start: start.launcher.send_signal(signal.SIGTERM),
        }

    def run(self, disturbances: int) -> Counts:
        """Disturb so many times; the counts say what has gone wrong."""
        with self._small_disk(), self._network():
            self._undisturbed()
            job = self._next_job()
            while (left := disturbances - self.counts.disturbances.total()) > 0:
                self._disturbed(job, left)
                if finished(job.output) is not None:
                    self._check(job)
                    job = self._next_job()
            while finished(job.output) is None:
                self._end(self._start(job))
            self._check(job)
        return self.counts

    def _undisturbed(self) -> None:
        """Run both models' jobs without disturbing them, and see how long one takes."""
        words = [sys.executable, "-m", "mpillm", "pack", CHAT, self._packed, "--weights", "f32"]
        assert run_bounded(words, env=clean_environment()).returncode == 0
        for model in (self._packed, CHAT):
            begun = time.monotonic()
            job = Job(model, self._reference(model), VARIATIONS[0])
            assert self._start(job).launcher.wait() == 0, self._log.read_text()
            took = time.monotonic() - begun
        report = json.loads((self._reference(CHAT) / "report.json").read_text())
        self._starting, self._computing = took - report["seconds"], report["seconds"]
        ranks = report["ranks"]
        self._sizes["weights"] = int(WEIGHTS * max(rank["weights"]["share"] for rank in ranks))
        self._sizes["kv"] = KV_BLOCKS * max(rank["kv"]["bytes"] // rank["kv"]["blocks"] for rank in ranks)

    def _length(self, job: Job) -> float:
        """About how many seconds a start takes, with what is left to be done."""
        done = _size(job.output / JOURNAL) / _size(self._reference(job.model) / JOURNAL)
        return self._starting + self._computing * max(0.0, 1 - done)

    def _reference(self, model: Path) -> Path:
        return self._folder / f"undisturbed-{model.parent.name}"

    def _next_job(self) -> Job:
        """A new job: one of the models, in one of the variations, into a directory of its own."""
        settings = tuple(setting.format(**self._sizes) for setting in self._random.choice(VARIATIONS))
        return Job(self._random.choice((CHAT, self._packed)), self._disk / str(self.counts.jobs), settings)

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

    def _launcher(self, on_hosts: bool, ulfm: bool) -> list[str | Path]:
        """mpiexec: here, or from the first host with half of the ranks on each."""
        words: list[str | Path] = [self._mpi.mpiexec]
        if on_hosts:
            assert self._hosts is not None
            hostfile = self._folder / "hosts"
            hostfile.write_text("".join(f"{NETWORK}.{number} slots={RANKS // 2}\n" for number in (1, 2)))
            words = self._hosts.launcher(self._mpi, hostfile)
            words += ["-x", "MPILLM_DEADLINE", "-x", "PYTHONPATH"]
        return [*words, *(["--with-ft", "ulfm"] if ulfm else []), "-n", str(RANKS)]

    def _start(self, job: Job, on_hosts: bool = False, ulfm: bool = False) -> Start:
        self.counts.starts += 1
        words = [*self._launcher(on_hosts, ulfm), sys.executable]
        words += command(self._input, job.output, *job.settings, model=job.model)
        env = self._mpi.environment(MPILLM_DEADLINE=str(WITH_ULFM if ulfm else DEADLINE))
        if on_hosts and self._hosts:
            kept = ("HOME", "PATH", "PYTHONPATH", "MPILLM_DEADLINE", *self._mpi.env)
            words = self._hosts.on_first(words, {name: env[name] for name in kept})
        with self._log.open("ab") as log:
            said = log.tell()
            launcher = subprocess.Popen(
                [str(word) for word in words],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return Start(launcher, job.output, on_hosts, said)

    def _disturbed(self, job: Job, most: int) -> None:
        """A start that is disturbed once; or, where ranks may die in it, up to `most` times."""
        ulfm = self._mpi.name == "openmpi" and self._random.random() < 0.5
        kind = self._next_kind(ulfm)
        latest = self._length(job) * (TWO_HOSTS if kind == CUT else EARLIER if ulfm else LATEST)
        start = self._start(job, kind == CUT, ulfm)
        pause = self._random.uniform(0, latest)
        if ulfm and self._random.random() < WHILE_COMPUTING:
            self._until_it_computes(start)
            pause = self._random.uniform(0, AGAIN * self._computing)
        for number in range(1, most + 1):
            with contextlib.suppress(subprocess.TimeoutExpired):
                start.launcher.wait(pause)
            if start.launcher.poll() is not None:
                self._decks[ulfm].append(kind)
                break
            name = f"{kind}, with ULFM" if ulfm else kind
            self.counts.disturbances[name] += 1
            self._say(f"{self.counts.disturbances.total()}: {name} after {pause:.1f} s")
            start.since = time.monotonic()
            self._kinds[kind](start)
            if not ulfm or kind not in CARRIED or not self._goes_on(start, name) or number == most:
                break
            kind = self._next_kind(ulfm, among_hosts=False)
            pause = self._random.uniform(0, AGAIN * self._computing)
        self._end(start)
        self.counts.codes[start.launcher.returncode] += 1
        (self._disk / "filler").unlink(missing_ok=True)

    def _until_it_computes(self, start: Start) -> None:
        """Or has ended: ranks cannot die before without ending the run, and starting takes most of the time."""
        size = _size(start.output / JOURNAL)
        while _size(start.output / JOURNAL) <= size and start.launcher.poll() is None:
            time.sleep(LOOK)

    def _said(self, start: Start) -> bytes:
        return self._log.read_bytes()[start.said_before :]

    def _next_kind(self, ulfm: bool, among_hosts: bool = True) -> str:
        """Each kind as often as it shall come, in some order, before any comes again."""
        deck = self._decks[ulfm]
        if not [kind for kind in deck if among_hosts or kind != CUT]:
            cards = [kind for kind in sorted(self._kinds) for _ in range(CARRIED.get(kind, 1) if ulfm else 1)]
            deck[:0] = self._random.sample(cards, len(cards))
        return deck.pop(next(i for i in reversed(range(len(deck))) if among_hosts or deck[i] != CUT))

    def _goes_on(self, start: Start, kind: str) -> bool:
        """Wait until a start that was disturbed goes on; False if it ends, or does neither."""
        size = 0
        while start.launcher.poll() is None and (waited := time.monotonic() - start.since) < PATIENCE:
            said = self._said(start).decode(errors="replace")
            lost = " ".join(re.findall(r"^mpillm: Lost (.*); the others", said, re.MULTILINE))
            told = lost.count("rank ") >= start.gone
            if told:
                self.counts.at_work_again.setdefault(kind, []).append(waited)
            # The rank had nothing to do any more, or more than one loss is told of at once.
            grown = waited > SURELY_LATER and size and _size(start.output / JOURNAL) > size
            if told or grown:
                self.counts.longest = max(self.counts.longest, waited)
                return True
            if waited > SURELY_LATER:
                size = size or _size(start.output / JOURNAL)
            time.sleep(LOOK)
        return False

    def _end(self, start: Start) -> None:
        """Wait for mpiexec and all its ranks. Behind a cut cable mpiexec may wait for ever; its ranks may not."""
        launcher, begun = start.launcher, start.since or time.monotonic()
        if not start.on_hosts and start.since:
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(max(0.0, begun + AFTER_THE_END - time.monotonic()))
        while (left := self._left(start)) or (launcher.poll() is None and not start.on_hosts):
            if start.on_hosts and all(_is_launcher(process) for process in left):
                break
            waited = time.monotonic() - begun
            if start.since and waited > AFTER_THE_END and finished(start.output) is not None:
                self.counts.after_the_end += 1  # stopped on its last lines: nothing is lost by that
                _kill(start, left)
                break
            if start.since and waited > PATIENCE:
                self.counts.orphans += max(len(left), 1)
                self._say(f"WRONG: {left} still there after {waited:.0f} s\n{self._last_words()}")
                _kill(start, left)
                break
            time.sleep(0.05)
        if start.since:
            seconds = time.monotonic() - begun
            self.counts.longest = max(self.counts.longest, seconds)
            self._say(f"   ended after {seconds:.1f} s, mpiexec with {launcher.poll()}")
        if start.on_hosts:
            self._restore()
        if launcher.wait() == CRASHED:
            self.counts.crashes += 1
            self._say(f"WRONG: an error nobody foresaw\n{self._last_words()}")
        if launcher.returncode == JobError.exit_code:
            raise ChaosError(f"The job was refused (seed {self.counts.seed}).\n{self._last_words()}")

    def _restore(self) -> None:
        """What is left of MPI itself on the hosts is ended, as its owner would, and the cable is mended."""
        assert self._hosts is not None
        for number in self._hosts.numbers:
            found = run_bounded(["ip", "netns", "pids", f"{self._hosts.prefix}{number}"]).stdout.split()
            for pid in map(int, found):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        run_bounded(["ip", "-n", self._hosts.switch, "link", "set", "port2", "up"])

    def _cut(self, _start: Start) -> None:
        assert self._hosts is not None
        run_bounded(["ip", "-n", self._hosts.switch, "link", "set", "port2", "down"])

    def _left(self, start: Start) -> list[psutil.Process]:
        """Processes of this run, wherever they now belong to."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(start.output) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _check(self, job: Job) -> None:
        """Compare a job that has come to its end with the undisturbed one."""
        self.counts.jobs += 1
        answers = Counter(json.loads(line)["custom_id"] for line in _lines(job.output / RESULTS[0]))
        asked = {json.loads(line)["custom_id"] for line in _lines(self._input)}
        lost, twice = len(asked - set(answers)), sum(count > 1 for count in answers.values())
        differing = [
            name
            for name in RESULTS
            if (job.output / name).read_bytes() != (self._reference(job.model) / name).read_bytes()
        ]
        self.counts.lost += lost
        self.counts.twice += twice
        self.counts.differing += len(differing)
        about = f"{job.output.name}: {REQUESTS} requests ({job.model.parent.name}, {' '.join(job.settings)})"
        if lost or twice or differing:
            kept = shutil.copytree(job.output, Path(tempfile.mkdtemp(prefix="chaos-wrong-")) / "output")
            self._say(f"WRONG: {about}: {lost} lost, {twice} twice, not the same: {differing}; see {kept}")
        else:
            self._say(f"{about}: the same bytes")
        shutil.rmtree(job.output)

    def _last_words(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]

    def _ranks(self, start: Start) -> list[psutil.Process]:
        """Those that are alive, and not stopped."""
        with contextlib.suppress(psutil.Error):
            below = psutil.Process(start.launcher.pid).children(recursive=True)
            return [process for process in below if _is_rank(process)]
        return []

    def _signal(self, start: Start, number: signal.Signals, most: int) -> None:
        ranks = self._ranks(start)
        for rank in self._random.sample(ranks, min(most, len(ranks))):
            with contextlib.suppress(psutil.Error):
                rank.send_signal(number)
                start.gone += 1

    def _fill_disk(self, _start: Start) -> None:
        with contextlib.suppress(OSError), (self._disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))


def _kill(start: Start, left: list[psutil.Process]) -> None:
    for process in (start.launcher, *left):
        with contextlib.suppress(psutil.Error):
            process.kill()
    start.launcher.wait()


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def _is_launcher(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return not _is_rank(process)
    return True


def _is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return "mpillm" in words and "-m" in words and "python" in words[0]
    return False
