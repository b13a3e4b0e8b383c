"""A whole Slurm on loopback for a test: munged, slurmctld and several slurmd, all under one directory.

Nothing of the machine's own Slurm is used or touched: own key, sockets, ports, state and logs. All daemons stay
in the foreground as children, so they are ended by process id.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import HANGS, clean_environment, run_bounded

DAEMONS = ("munged", "slurmctld", "slurmd")
CLIENTS = ("sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo", "setpriv")


def missing() -> str | None:
    """Say why no Slurm can be started here, or None."""
    if os.geteuid() != 0:
        return "only root can start a Slurm"
    absent = [name for name in (*DAEMONS, *CLIENTS) if not _find(name)]
    return (
        f"not installed: {', '.join(absent)} (apt install munge slurmctld slurmd slurm-client)"
        if absent
        else None
    )


def _find(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


CONF = """\
ClusterName=mpillmtest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential has expired: 120 s unless told.
AuthInfo=socket={root}/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdSpoolDir={root}/spool-%n
SlurmdPidFile={root}/slurmd-%n.pid
SlurmdLogFile={root}/slurmd-%n.log
SlurmdParameters=config_overrides
TmpFS={root}/tmp-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=5
MinJobAge=600
OverTimeLimit=0
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=2
"""


@dataclass(frozen=True)
class Job:
    """What scontrol last said of a job, and its log."""

    state: str
    exit_code: int
    restarts: int
    log: str


class Slurm:
    """A running Slurm; `environment` lets commands talk to it."""

    def __init__(self, root: Path, nodes: tuple[str, ...], cpus: int) -> None:
        self.root = root
        self.nodes = nodes
        self.cpus = cpus
        self.processes: list[subprocess.Popen[bytes]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[Slurm]:
        try:
            self._start()
            yield self
        finally:
            self._stop()

    def environment(self, **more: str) -> dict[str, str]:
        return clean_environment(SLURM_CONF=str(self.root / "slurm.conf"), **more)

    def command(self, *words: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
        """Run a Slurm command and return what it says; AssertionError if it fails."""
        done = run_bounded(list(words), 60, env or self.environment(), cwd)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def submit(self, *words: str | Path, cwd: Path, env: dict[str, str] | None = None) -> int:
        """Type `sbatch words` in `cwd`; return the job's number."""
        environment = self.environment(**(env or {}))
        return int(self.command("sbatch", "--parsable", *words, env=environment, cwd=cwd))

    def look(self, job: int | str) -> dict[str, str]:
        fields = self.command("scontrol", "show", "job", "--oneliner", str(job)).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, job: int | str, log: Path, restart: bool = True) -> Job:
        """Wait for the job's end; a job that went back into the queue is waited for, unless `restart` is off."""
        end = time.monotonic() + HANGS
        while time.monotonic() < end:
            seen = self.look(job)
            state = seen["JobState"]
            if state not in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "SIGNALING"):
                break
            if state == "PENDING" and seen["Restarts"] != "0" and not restart:
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"job {job} did not end: {seen}\n{self._logs()}\n{_read(log)}")
        return Job(state, int(seen["ExitCode"].split(":")[0]), int(seen["Restarts"]), _read(log))

    def _start(self) -> None:
        root, host = self.root, socket.gethostname()
        root.chmod(0o755)  # munge trusts no socket below a directory that others may not enter
        for folder in ("state", *(f"{kind}-{node}" for node in self.nodes for kind in ("spool", "tmp"))):
            (root / folder).mkdir()
        key = root / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        ports = _free_ports(1 + len(self.nodes))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} "
            "RealMemory=4096 State=UNKNOWN"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        )
        (root / "slurm.conf").write_text(CONF.format(host=host, root=root, ports=ports, nodes=nodes))
        # --force: munged has opinions about who may own the directories above; a test's are what they are.
        files = {
            "socket": "munge.sock",
            "pid-file": "munge.pid",
            "log-file": "munge.log",
            "seed-file": "seed",
        }
        options = [f"--{option}={root / name}" for option, name in files.items()]
        self._spawn("munged", "--foreground", "--force", f"--key-file={key}", *options)
        self._until("munged", (root / "munge.sock").exists)
        self._spawn("slurmctld", "-D")
        for node in self.nodes:
            self._spawn("slurmd", "-D", "-N", node)
        self._until("Slurm", lambda: self._idle() == len(self.nodes))

    def _idle(self) -> int:
        """The number of nodes that are ready for work."""
        done = run_bounded(
            ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%t"], 30, self.environment()
        )
        return done.stdout.split().count("idle")

    def _spawn(self, name: str, *options: str) -> None:
        program = _find(name)
        assert program
        with open(self.root / f"{name}{len(self.processes)}.out", "wb") as out:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig=TERM", program, *options],  # a killed test leaves no daemon behind
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)

    def _until(self, what: str, ready: object) -> None:
        assert callable(ready)
        end = time.monotonic() + HANGS
        while not ready():
            dead = [process.args for process in self.processes if process.poll() is not None]
            assert not dead, f"ended at once: {dead}\n{self._logs()}"
            assert time.monotonic() < end, f"{what} did not come up\n{self._logs()}"
            time.sleep(0.1)

    def _stop(self) -> None:
        """Cancel what runs, then end the daemons in reverse order, and what is left, by process id."""
        with contextlib.suppress(AssertionError):
            self.command("scancel", "--user=root", "--signal=KILL", "--full")
            self.command("scancel", "--user=root")
            self._until("the end of all jobs", lambda: not self.command("squeue", "--noheader").strip())
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for left in self._left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)

    def _left(self) -> Iterator[int]:
        """Processes of this Slurm that outlived it: they have its configuration in their environment."""
        mark = f"SLURM_CONF={self.root / 'slurm.conf'}\0".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if int(path.parent.name) != os.getpid() and mark in path.read_bytes() + b"\0":
                    yield int(path.parent.name)

    def _logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{_read(path)[-1500:]}" for path in sorted(self.root.glob("*.[lo][ou][gt]"))
        )


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
