"""A supervisor around mpiexec: starts a run, starts it again after what no rank can survive, and on other hosts.

It takes no part in MPI and trusts nothing that mpiexec says: a run is complete when its journal says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from types import FrameType

import msgspec
from msgspec.structs import replace

from mpillm.comm.launch import STOPS, Library
from mpillm.errors import Interrupted, JobError, LayoutError
from mpillm.launching.hostfile import HostSlots, hostfile_text, read_hosts, write_hosts
from mpillm.launching.mpiexec import Settings, command, ranks_of, stop_with_caller, stopped_by
from mpillm.launching.reach import NoHostError, answering, silent_hosts
from mpillm.launching.remarks import Remarks
from mpillm.launching.watch import LOOK, run_watched
from mpillm.planning import plan
from mpillm.spec import Spec
from mpillm.store.directory import Directory
from mpillm.store.journal_facts import finished
from mpillm.store.output import JOURNAL
from mpillm.store.results import JSONL

log = logging.getLogger(__name__)

# What restarts on other ranks change.
CHANGED = (
    "layout.replicas",
    "layout.stages",
    "layout.shards",
    "memory.weights",
    "memory.kv",
    "layout.threads",
)
BACK_OFF = (1.0, 5.0, 20.0, 60.0)  # seconds before the next start, by the number of starts without progress


def ranks_that_work(spec: Spec, maximum: int) -> int:
    """Return the largest number of ranks, up to `maximum`, on which the job can be laid out and fits its budgets."""
    refused: str | None = None
    for ranks in range(maximum, 0, -1):
        try:
            problems = plan.make(spec, ranks).problems
        except LayoutError as error:
            problems = [str(error)]
        if not problems:
            return ranks
        refused = refused or problems[0]
    raise LayoutError(refused or f"The number of ranks must be at least 1, not {maximum}.")


def on_fewer_ranks(spec: Spec, ranks: int) -> Spec:
    """Return the job as these ranks can compute it: with fewer replicas, or laid out anew if they are too few for one.

    Each of those that are left computes more.
    """
    layout = spec.layout
    of_one = math.prod(part for part in (layout.stages, layout.shards) if part != "auto")
    if ranks < of_one:
        return spec.with_automatic_layout()
    if layout.replicas == "auto":
        return spec
    return replace(spec, layout=replace(layout, replicas=min(layout.replicas, ranks // of_one)))


class Supervisor:
    """Starts the run until its journal says that it is complete, or until going on makes no sense."""

    def __init__(
        self,
        spec: Spec,
        library: Library,
        settings: Settings,
        program: Sequence[str],
        say: Callable[[str], None],
        out: Callable[[str], None],
        error: Callable[[str], None],
    ) -> None:
        """`program` is what each rank runs; `say` tells the user; `out` and `error` show a line of the ranks."""
        self._spec, self._library, self._settings = spec, library, settings
        self._program, self._say = program, say
        self._out, self._error = out, error
        self._told: signal.Signals | None = None  # to stop, and by what
        self._prepares = False  # whether it asks hosts or plans now, both of which may take long
        self._output: Directory | None = None  # as it was before the first start
        self._journal_seen = False

    def run(self) -> int:
        """Return the exit code: 0 or 1 for a complete run, 2 for a wrong job, 75 if it may go on later."""
        before = [signal.signal(number, self._tell) for number in STOPS]
        try:
            stop_with_caller()
            with contextlib.ExitStack() as stack:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mpillm-")))
                self._open_output(stack)
                return self._until_complete(folder)
        finally:
            for number, handler in zip(STOPS, before, strict=True):
                signal.signal(number, handler)

    def _tell(self, number: int, _frame: FrameType | None) -> None:
        self._told = signal.Signals(number)
        if self._prepares:
            raise Interrupted(stopped_by(self._told))

    def _open_output(self, stack: contextlib.ExitStack) -> None:
        """Make and open the output directory; where that fails, rank 0 says why. What stays empty is removed."""
        path = self._spec.output_path
        with contextlib.suppress(OSError):
            if not path.exists():
                path.mkdir(parents=True)
                stack.callback(_remove_if_empty, path)
            self._output = stack.enter_context(Directory(path))
            # As long as it is locked, `status` says that the run goes on, also between two starts.
            fcntl.flock(self._output, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _output_is_gone(self) -> bool:
        """Return whether the output directory, or the journal in it, was moved or deleted since the start."""
        if self._output is not None and not self._output.is_at_its_path():
            return True
        return self._journal_seen and not self._journal_size()

    def _until_complete(self, folder: Path) -> int:
        fruitless, first = 0, True
        while True:
            self._prepares = True
            hosts = self._hosts(first)
            maximum = ranks_of(self._settings, hosts)
            spec = self._spec if first else on_fewer_ranks(self._spec, maximum)
            spec = spec.of_ranks(numbers) if (numbers := self._numbers(hosts)) else spec
            ranks = ranks_that_work(spec, maximum)
            self._prepares = False
            size, written = self._journal_size(), self._journal_written()
            remarks = Remarks(self._out, self._error)
            code, grown = self._once(ranks, hosts, folder, remarks, spec)
            outcome = finished(self._spec.output_path)
            # This start has said so, not one before it, since when the input may have grown. (It may be shorter: what
            # was computed before the model's files were touched is checked, and noted, anew.)
            if outcome is not None and self._journal_written() != written:
                complete = 1 if outcome.errors else 0
                if code != complete:  # mpiexec has said more, after rank 0
                    self._say(f"The run is complete; the results are in {self._spec.output_path / JSONL}.")
                return complete
            if self._told:
                self._say(stopped_by(self._told))
                return Interrupted.exit_code
            if first and code == JobError.exit_code:
                return code  # rank 0 has said why
            first = False
            if self._output_is_gone():
                self._say(
                    f"The output directory {self._spec.output_path} was moved or deleted; the run stops."
                )
                return Interrupted.exit_code
            if grown:
                continue
            fruitless = 0 if self._journal_size() > size else fruitless + 1
            if fruitless and remarks.cause() is None:
                remarks.show()
            if fruitless > len(BACK_OFF):
                self._say(
                    f"Gave up after {fruitless} starts that added nothing to the journal. Remove the cause "
                    "shown above, then run the same command again to continue."
                )
                return Interrupted.exit_code
            pause = BACK_OFF[max(0, fruitless - 1)]
            why = remarks.cause() or _how(code)
            self._say(f"The run ended before it was complete ({why}); the next start is in {pause:g} s.")
            self._sleep(pause)

    def _hosts(self, first: bool) -> list[HostSlots]:
        """Return the hosts that answer; all of them if those of an earlier start are away, for they may come back."""
        try:
            return answering(self._settings, self._say)
        except NoHostError:
            if first or self._settings.hostfile is None:
                raise
            return read_hosts(self._settings.hostfile)

    def _numbers(self, hosts: Sequence[HostSlots]) -> list[int]:
        """Return the numbers that the ranks on these hosts have if no host of the hostfile is away; none if none is.

        Lists of the job have values for these numbers.
        """
        listed = read_hosts(self._settings.hostfile) if self._settings.hostfile is not None else []
        names = [host.name for host in listed for _ in range(host.slots)]
        there = {host.name for host in hosts}
        found = [number for number, name in enumerate(names) if name in there]
        return found if len(found) < len(names) else []

    def _journal_size(self) -> int:
        with contextlib.suppress(OSError):
            return (self._spec.output_path / JOURNAL).stat().st_size
        return 0

    def _journal_written(self) -> int:
        """Return the time of the last write to the journal in nanoseconds; 0 if there is no journal."""
        with contextlib.suppress(OSError):
            return (self._spec.output_path / JOURNAL).stat().st_mtime_ns
        return 0

    def _once(
        self, ranks: int, hosts: list[HostSlots], folder: Path, remarks: Remarks, spec: Spec
    ) -> tuple[int, bool]:
        """Start mpiexec once; return its exit code, and whether it was stopped because the hostfile has changed."""
        known, size = self._hostfile_text(), self._journal_size()
        hostfile = folder / "hosts" if hosts else None
        if hostfile:
            write_hosts(hostfile, hosts, self._library)
        grown = False

        def shall_stop() -> bool:
            self._journal_seen = self._journal_seen or self._journal_size() > 0
            return grown or self._told is not None

        def have_worked() -> bool:
            nonlocal size, grown
            if not shall_stop() and self._hostfile_text() not in (known, ""):
                grown = True
                self._say("The hostfile has changed; the run starts again with its hosts.")
            before, size = size, max(size, self._journal_size())
            return size > before

        def cannot_start() -> (
            bool
        ):  # while its daemons start, Open MPI waits for ever for a host that is lost
            return bool(silent_hosts(self._settings.agent, hosts))

        words = command(self._library, self._settings, ranks, hostfile, folder)
        log.info("starting %d ranks", ranks)
        words += self._program
        for key in CHANGED:
            of = attrgetter(key)
            if of(spec) != of(self._spec):
                words.append(f"--set={key}={msgspec.json.encode(of(spec)).decode()}")
        code = run_watched(words, remarks, shall_stop, have_worked, cannot_start)
        return code, grown

    def _hostfile_text(self) -> str:
        with contextlib.suppress(OSError):
            if self._settings.hostfile is not None:
                return hostfile_text(self._settings.hostfile)
        return ""

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._told:
            time.sleep(LOOK)


def _remove_if_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()


def _how(code: int) -> str:
    """Return a clause on the end of mpiexec. `code` is that of subprocess: minus the signal if one ended it."""
    return f"exit code {code} of mpiexec" if code >= 0 else f"{signal.Signals(-code).name} ended mpiexec"
