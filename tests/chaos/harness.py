"""Jobs that are disturbed at random moments, and started again with the same command until they are done.

Processes are killed, stopped and told to end, disks are filled, files are moved, deleted, damaged and edited. Each
start has another layout and other budgets. What must hold afterwards: every request is answered once, in the bytes of
an undisturbed run; no start hung for longer than PATIENCE after it was disturbed (without the time for which a busy
machine had no core for it); and no process outlived its mpiexec.
Some starts are made so that ranks may die in them (Open MPI's ULFM): such a start is disturbed again and again, until
it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from mpillm.comm.running import CRASHED
from mpillm.errors import Interrupted, JobError
from mpillm.store.journal_facts import finished
from mpillm.store.output import JOURNAL
from tests.chaos.counts import Counts
from tests.chaos.files import Files
from tests.chaos.jobs import Command, Commands
from tests.chaos.patience import Patience
from tests.chaos.starts import (
    Job,
    Kind,
    Start,
    file_size,
    is_launcher,
    is_rank,
    kill,
    lines,
    signalled,
    sizes,
    stretched,
)
from tests.cluster import hosts as tools
from tests.cluster.hosts import NETWORK, Hosts
from tests.conftest import Mpi, clean_environment, run_bounded
from tests.e2e.jobs import CHAT, command

RANKS = 4  # of starts in which ranks may die, and of those on two hosts
REQUESTS = 80
PATIENCE = 30.0  # seconds from a disturbance to the end of all processes
# The same, once all results are written: a rank that is stopped then stays until it is ended.
AFTER_THE_END = 8.0
DEADLINE = 2.0  # MPILLM_DEADLINE of the disturbed runs; while ranks start it is six times that
WITH_ULFM = 4.0  # the same, where stopped ranks are to be seen and killed before
ULFM = 0.15  # so many starts are made so that ranks may die in them
WHILE_STARTING = 0.3  # so many of the other starts are disturbed before they compute
REFUSED = 0.15  # so often a start that must be refused comes between two others
EDITS = 0.5  # so many of the starts that are refused have an edited model, the others are of another job
FLIPS = 0.2  # so often bits of the journal are flipped before a start
WHILE_COMPUTING = 0.7  # so often starts with ULFM are disturbed first when they compute
EARLIER = 0.6  # disturbances with ULFM come within this part of the time that a start would take undisturbed
TWO_HOSTS = 1.8  # how much longer that is on two hosts
AGAIN = 0.3  # the next ones come within this part of the time of computing
JITTER = 0.3  # seconds
RESULTS = ("results.jsonl", "results.h5")
LOOK = 0.02  # seconds between two looks at what runs
SURELY_LATER = 1.0  # seconds after which what the journal gains was computed after the disturbance

STOPPED = "rank stopped"  # nobody notices it where there is no other one
CUT = "cable cut"  # the kind that needs hosts of its own
# Kinds that a start with ULFM goes on after, and how often each comes there for one of any other kind.
CARRIED = {"rank killed": 4, "two ranks killed": 3, STOPPED: 2}

# Stages and shards of a start. Sums are made of f32 parts, so all of them give the same bytes.
ALONE = 3  # of them have one rank
LAYOUTS = ((1, 1), (1, 1), (1, 1), (2, 1), (1, 2), (2, 2))
# What else a start may ask for: none of it changes a byte. Small batches, so that there is time to disturb it.
VARIATIONS = (
    ("batch.max_num_seqs=4",),
    ("batch.max_num_seqs=4", "job.checkpoint_tokens=1"),
    ("batch.max_num_seqs=3", "job.checkpoint_tokens=5", "memory.kv={kv}"),
    ("batch.max_num_seqs=5", "job.checkpoint_tokens=0", "batch.max_num_batched_tokens=16"),
    ("batch.max_num_seqs=4", "job.checkpoint_tokens=3", "memory.weights={weights}"),
    ("batch.max_num_seqs=4", "job.checkpoint_tokens=7", "draft.model={draft}"),
)

DONE = frozenset({0})
MOVED = DONE | {Interrupted.exit_code}
EDITED = DONE | {JobError.exit_code}


class Chaos:
    """The jobs, and those who disturb them."""

    def __init__(
        self, mpi: Mpi, folder: Path, seed: int, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self._mpi, self._folder, self._say = mpi, folder, say
        self._random = random.Random(seed)
        self._decks: dict[bool, list[str]] = {False: [], True: []}
        self.counts = Counts(seed)
        self._commands = Commands(folder, REQUESTS, self._random)
        self._log = folder / "log"
        self._disk = folder / "disk"
        self._disk.mkdir()
        self._packed = folder / "packed" / CHAT.name
        self._plain = shutil.copytree(CHAT, folder / "plain" / CHAT.name)
        self._files = Files(self._random)
        self._sizes: dict[tuple[Path, int, int], tuple[int, int]] = {}
        self._starting = self._computing = 0.0  # seconds of an undisturbed run
        self._hosts: Hosts | None = None
        files = self._files
        self._kinds = {
            "rank killed": signalled(lambda start: self._signal(start, signal.SIGKILL, 1)),
            "two ranks killed": signalled(lambda start: self._signal(start, signal.SIGKILL, 2)),
            STOPPED: signalled(lambda start: self._signal(start, signal.SIGSTOP, 1)),
            "all ranks killed": signalled(lambda start: self._signal(start, signal.SIGKILL, RANKS)),
            "mpiexec killed": signalled(lambda start: start.launcher.kill()),
            "warned": signalled(lambda start: start.launcher.send_signal(signal.SIGUSR1)),
            "told to end": signalled(lambda start: start.launcher.send_signal(signal.SIGTERM)),
            "output moved": Kind(lambda start: files.move(start.job.output), MOVED),
            "output deleted": Kind(lambda start: files.delete(start.job.output), MOVED),
            "journal damaged": Kind(lambda start: files.flip_bits(start.job.output), MOVED),
            "model edited": Kind(self._edit_model, EDITED),
            # What is paged in meanwhile cannot be told from a changed file.
            "model touched": Kind(lambda start: files.touch(start.job.model), EDITED),
        }

    def run(self, disturbances: int) -> Counts:
        """Disturb so many times; the counts say what has gone wrong."""
        with self._small_disk(), self._network():
            self._undisturbed()
            job = self._next_job()
            while (left := disturbances - self.counts.disturbances.total()) > 0:
                self._damage(job)
                if self._random.random() < REFUSED:
                    self._refused(job)
                self._disturbed(job, left)
                if finished(job.output) is not None:
                    self._check(job)
                    job = self._next_job()
            if finished(job.output) is None:
                self._end(self._start(job, deadline=PATIENCE))
            self._check(job)
        return self.counts

    def _undisturbed(self) -> None:
        """Run both models' jobs without disturbing them, and see how long one takes."""
        words: list[str | Path] = [
            sys.executable,
            "-m",
            "mpillm",
            "pack",
            CHAT,
            self._packed,
            "--weights",
            "f32",
        ]
        assert run_bounded(words, env=clean_environment()).returncode == 0
        for model in (self._packed, self._plain):
            for stages, shards in LAYOUTS:
                self._sizes[model, stages, shards] = sizes(model, stages, shards)
            begun = time.monotonic()
            job = Job(model, self._reference(model))
            assert self._start(job, 2, 2, deadline=PATIENCE).launcher.wait() == 0, self._log.read_text()
            took = time.monotonic() - begun
        report = json.loads((self._reference(self._plain) / "report.json").read_text())
        self._starting, self._computing = took - report["seconds"], report["seconds"]

    def _length(self, job: Job) -> float:
        """About how many seconds a start on four ranks takes, with what is left to be done."""
        done = file_size(job.output / JOURNAL) / file_size(self._reference(job.model) / JOURNAL)
        return self._starting + self._computing * max(0.0, 1 - done)

    def _reference(self, model: Path) -> Path:
        return self._folder / f"undisturbed-{model.parent.name}"

    def _next_job(self) -> Job:
        """A new job: one of the models, into a directory of its own."""
        return Job(self._random.choice((self._plain, self._packed)), self._disk / str(self.counts.jobs))

    @contextlib.contextmanager
    def _network(self) -> Iterator[None]:
        """Two hosts whose cable can be cut, where this user may make them (Open MPI alone runs on them here)."""
        reason = tools.missing() if self._mpi.name == "openmpi" else f"{self._mpi.name} does not run on them"
        if reason:
            self._say(f"no cable is cut: {reason}")
            yield
            return
        with Hosts(self._folder, 2).up() as self._hosts:
            self._kinds[CUT] = signalled(self._cut)
            yield

    @contextlib.contextmanager
    def _small_disk(self) -> Iterator[None]:
        """A disk that can be filled, where this user may mount one."""
        words: list[str | Path] = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", self._disk]
        if os.geteuid() or run_bounded(words).returncode:
            self._say("no tmpfs can be mounted here: disks are not filled")
            yield
            return
        self._kinds["disk full"] = signalled(lambda start: self._fill_disk())
        self._kinds["disk full for the results"] = Kind(self._leave_too_little, MOVED)
        try:
            yield
        finally:
            run_bounded(["umount", "--lazy", self._disk])

    def _settings(self, job: Job, stages: int, shards: int) -> list[str]:
        """The layout, and one of the variations."""
        weights, kv = self._sizes[job.model, stages, shards]
        varied = self._random.choice(VARIATIONS)
        layout = [f"layout.stages={stages}", f"layout.shards={shards}"]
        return layout + [setting.format(weights=weights, kv=kv, draft=CHAT) for setting in varied]

    def _launcher(self, ranks: int, on_hosts: bool, ulfm: bool) -> list[str | Path]:
        """mpiexec: here, or from the first host with half of the ranks on each."""
        words: list[str | Path] = [self._mpi.mpiexec]
        if on_hosts:
            assert self._hosts is not None
            hostfile = self._folder / "hosts"
            hostfile.write_text("".join(f"{NETWORK}.{number} slots={RANKS // 2}\n" for number in (1, 2)))
            words = self._hosts.launcher(self._mpi, hostfile)
            words += ["-x", "MPILLM_DEADLINE", "-x", "PYTHONPATH"]
        return [*words, *(["--with-ft", "ulfm"] if ulfm else []), "-n", str(ranks)]

    def _start(
        self,
        job: Job,
        stages: int = 1,
        shards: int = 1,
        on_hosts: bool = False,
        ulfm: bool = False,
        deadline: float = DEADLINE,
        asked: Command | None = None,
    ) -> Start:
        self.counts.starts += 1
        asked = asked or self._commands.own
        words = [*self._launcher(stages * shards, on_hosts, ulfm), sys.executable]
        settings = [*asked.words(), *self._settings(job, stages, shards)]
        words += command(asked.source, job.output, *settings, model=job.model)
        env = self._mpi.environment(MPILLM_DEADLINE=f"{stretched(WITH_ULFM if ulfm else deadline):.1f}")
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
        return Start(launcher, job, on_hosts, said)

    def _damage(self, job: Job) -> None:
        """Perhaps, flip bits of the journal between two starts."""
        if self._random.random() < FLIPS and self._files.flip_bits(job.output):
            self._count("journal damaged between starts")

    def _refused(self, job: Job) -> None:
        """A start with an edited model, or of another job, if the job has begun."""
        if file_size(job.output / JOURNAL) == 0:
            return
        asked = None
        if self._random.random() < EDITS:
            self._count("model edited between starts", self._files.edit(job.model, self._commands.adapter))
        else:
            name, asked = self._commands.another()
            self._count("job edited between starts", name)
        start = self._start(job, asked=asked)
        self._end(start, frozenset({JobError.exit_code}))
        self._files.undo()

    def _disturbed(self, job: Job, maximum: int) -> None:
        """A start that is disturbed once; or, where ranks may die in it, up to `maximum` times."""
        ulfm = self._mpi.name == "openmpi" and self._random.random() < ULFM
        name = self._next_kind(ulfm)
        kind = self._kinds[name]
        if ulfm or name == CUT:
            latest = self._length(job) * (TWO_HOSTS if name == CUT else EARLIER)
            start = self._start(job, 2, 2, name == CUT, ulfm)
            pause = self._random.uniform(0, latest)
            if self._random.random() < WHILE_COMPUTING or kind.while_computing:
                self._until_it_computes(start)
                pause = self._random.uniform(0, AGAIN * self._computing)
        else:
            start = self._start(job, *self._random.choice(LAYOUTS[ALONE:] if name == STOPPED else LAYOUTS))
            if kind.while_computing or self._random.random() > WHILE_STARTING:
                self._until_some_is_computed(start)
                pause = self._random.uniform(0, JITTER)
            else:
                pause = self._random.uniform(0, self._starting)
        for number in range(1, maximum + 1):
            with contextlib.suppress(subprocess.TimeoutExpired):
                start.launcher.wait(pause)
            if start.launcher.poll() is not None:
                self._decks[ulfm].append(name)
                break
            if name == STOPPED and len(self._ranks(start)) < 2:
                self._decks[ulfm].append(name)
                break  # nobody would notice it
            told = f"{name}, with ULFM" if ulfm else name
            self._count(told, f"{pause:.1f} s")
            start.since = time.monotonic()
            kind.do(start)
            if not ulfm or name not in CARRIED or not self._goes_on(start, told) or number == maximum:
                break
            name = self._next_kind(ulfm, among_hosts=False)
            kind = self._kinds[name]
            pause = self._random.uniform(0, AGAIN * self._computing)
        self._end(start, kind.codes if start.since else DONE)
        self.counts.codes[start.launcher.returncode] += 1
        self._files.undo()
        (self._disk / "filler").unlink(missing_ok=True)

    def _count(self, kind: str, how: str = "") -> None:
        self.counts.disturbances[kind] += 1
        self._say(f"{self.counts.disturbances.total()}: {kind} {how}")

    def _until_some_is_computed(self, start: Start) -> None:
        """Or has ended; some is a random part of what is left."""
        whole, done = (
            file_size(self._reference(start.job.model) / JOURNAL),
            file_size(start.job.output / JOURNAL),
        )
        until = max(done, 1) + self._random.random() * max(whole - done, whole // 10)
        while file_size(start.job.output / JOURNAL) < until and start.launcher.poll() is None:
            time.sleep(LOOK)

    def _until_it_computes(self, start: Start) -> None:
        """Or has ended: ranks cannot die before without ending the run, and starting takes most of the time."""
        before = file_size(start.job.output / JOURNAL)
        while file_size(start.job.output / JOURNAL) <= before and start.launcher.poll() is None:
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
            told = len(set(re.findall(r"rank \d+", lost))) >= start.gone  # each sentence names all lost ranks
            if told:
                self.counts.at_work_again.setdefault(kind, []).append(waited)
            # The rank had nothing to do any more, or more than one loss is told of at once.
            grown = waited > SURELY_LATER and size and file_size(start.job.output / JOURNAL) > size
            if told or grown:
                self.counts.longest = max(self.counts.longest, waited)
                return True
            if waited > SURELY_LATER:
                size = size or file_size(start.job.output / JOURNAL)
            time.sleep(LOOK)
        return False

    def _end(self, start: Start, codes: frozenset[int] | None = DONE) -> None:
        """Wait for mpiexec and all its ranks. Behind a cut cable mpiexec may wait for ever; its ranks may not.

        It ends with one of `codes`; None: anything but an error.
        """
        launcher, begun = start.launcher, start.since or time.monotonic()
        patience, size, waited, killed = Patience(begun), 0, 0.0, False
        while (left := self._left(start)) or (launcher.poll() is None and not start.on_hosts):
            if start.on_hosts and all(is_launcher(process) for process in left):
                break
            if (
                now := file_size(start.job.output / JOURNAL)
            ) != size:  # what it was disturbed by did not end it
                size = now
                patience.renew()
            waited = patience.spent(process.pid for process in left)
            if start.gone and waited > AFTER_THE_END and finished(start.job.output) is not None:
                self.counts.after_the_end += 1  # stopped on its last lines: nothing is lost by that
                killed = True
            elif start.since and waited > PATIENCE:
                self.counts.orphans += max(len(left), 1)
                self._say(f"WRONG: {left} still there after {waited:.0f} s\n{self._last_words()}")
                killed = True
            if killed:
                kill(start, left)
                break
            time.sleep(0.05)
        if start.since:
            seconds = time.monotonic() - begun
            self.counts.longest = max(self.counts.longest, waited)
            self._say(f"   ended after {seconds:.1f} s, mpiexec with {launcher.poll()}")
        if start.on_hosts:
            self._restore()
        code = launcher.wait()
        if code == CRASHED:
            self.counts.crashes += 1
            self._say(f"WRONG: an error nobody foresaw\n{self._last_words()}")
        elif not killed and (code == JobError.exit_code if codes is None else code not in codes):
            self.counts.other_codes += 1
            self._say(f"WRONG: exit code {code}\n{self._last_words()}")

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
                if str(start.job.output) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _check(self, job: Job) -> None:
        """Compare a job that has come to its end with the undisturbed one."""
        self.counts.jobs += 1
        written = (job.output / RESULTS[0]).exists()
        answers = Counter(
            json.loads(line)["custom_id"] for line in (lines(job.output / RESULTS[0]) if written else ())
        )
        asked = {json.loads(line)["custom_id"] for line in lines(self._commands.own.source)}
        lost, twice = len(asked - set(answers)), sum(count > 1 for count in answers.values())
        differing = [
            name
            for name in RESULTS
            if not written
            or (job.output / name).read_bytes() != (self._reference(job.model) / name).read_bytes()
        ]
        self.counts.lost += lost
        self.counts.twice += twice
        self.counts.differing += len(differing)
        about = f"{job.output.name}: {REQUESTS} requests ({job.model.parent.name})"
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
            return [process for process in below if is_rank(process)]
        return []

    def _signal(self, start: Start, number: signal.Signals, maximum: int) -> None:
        ranks = self._ranks(start)
        for rank in self._random.sample(ranks, min(maximum, len(ranks))):
            with contextlib.suppress(psutil.Error):
                rank.send_signal(number)
                start.gone += 1

    def _edit_model(self, start: Start) -> None:
        self._say(f"   {self._files.edit(start.job.model, self._commands.adapter)}")

    def _leave_too_little(self, start: Start) -> None:
        """Fill the disk so that what is computed fits and the results do not, or not all of them."""
        reference, output = self._reference(start.job.model), start.job.output
        left = max(file_size(reference / JOURNAL) - file_size(output / JOURNAL), 0)
        self._fill_disk(left + self._random.randrange(sum(file_size(reference / name) for name in RESULTS)))

    def _fill_disk(self, leave: int = 0) -> None:
        found = os.statvfs(self._disk)
        nbytes = max(found.f_bavail * found.f_frsize - leave, 0)
        with contextlib.suppress(OSError), (self._disk / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
