"""The command that starts ranks with mpiexec, and the end of what it started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from mpillm.comm.launch import RESTARTED, SUPERVISED, Library
from mpillm.launching.hostfile import HostSlots
from mpillm.launching.remarks import Remarks

CALLER = "MPILLM_CALLER"  # names the process whose end stops a run that it has started: a script that called Job.run
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@dataclass(frozen=True)
class Settings:
    """The settings of the supervisor: `ranks` on this machine, or the hosts of `hostfile`."""

    ranks: int | None = None
    hostfile: Path | None = None
    agent: str = "ssh"  # starts a command on another host: AGENT HOST COMMAND
    mpi_options: tuple[str, ...] = ()  # options for mpiexec


def command(
    library: Library,
    settings: Settings,
    ranks: int,
    hostfile: Path | None,
    folder: Path | None,
    restarted: bool = True,
) -> list[str]:
    """mpiexec with what this MPI needs: more ranks than cores allowed, nothing bound to one core, the agent.

    Ranks that will be `restarted` are told so, and where it can (Open MPI 5) it lets the others go on when one dies. It
    keeps its session in `folder`: in the system's folder for temporary files, what a killed mpiexec left stops a later
    one that has its process id. Without a folder it uses the system's.
    """
    mpiexec = str(library.mpiexec() or "mpiexec")
    if library.name == "MPICH":
        words = [mpiexec, *(["-f", str(hostfile)] if hostfile else [])]
        words += ["-launcher", "ssh", "-launcher-exec", settings.agent] if settings.agent != "ssh" else []
        words += ["-genv", RESTARTED, "1"] if restarted else []
    else:
        words = [mpiexec, "--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none"]
        words += ["-x", SUPERVISED]  # other hosts get no variable that is not named
        words += ["-x", f"{RESTARTED}=1"] if restarted else []
        if library.version >= (5,):
            words += ["--with-ft", "ulfm"] if restarted else []
            words += ["--prtemca", "prte_local_tmpdir_base", str(folder)] if folder else []
        words += ["--hostfile", str(hostfile)] if hostfile else []
        words += ["--prtemca", "plm_ssh_agent", settings.agent] if settings.agent != "ssh" else []
    return [*words, *settings.mpi_options, "-n", str(ranks)]


def start(words: Sequence[str], remarks: Remarks, attended: bool = False) -> subprocess.Popen[bytes]:
    """Start mpiexec in a session of its own, supervised by this process: `remarks` takes what it writes.

    If it is `attended`, it stays in this session and writes to this process's stdout itself: what is typed on the
    terminal reaches rank 0, and Ctrl-C reaches mpiexec.
    """
    with remarks.pipes() as (out, error):
        return subprocess.Popen(
            words,
            stdout=None if attended else out,
            stderr=error,
            env={**os.environ, SUPERVISED: str(os.getpid()), **as_root()},
            start_new_session=not attended,
            preexec_fn=_end_with_parent,  # noqa: PLW1509 (there is no other thread at this moment)
        )


def tell_to_stop(launcher: subprocess.Popen[bytes]) -> None:
    """Have all ranks stop in order: both MPIs pass SIGUSR1 on; on SIGTERM they kill at once."""
    launcher.send_signal(signal.SIGUSR1)


def stopped_by(told: signal.Signals) -> str:
    """Return the sentence for the user after a signal has stopped the ranks."""
    return f"Stopped by {told.name}; run the same command again to continue."


def stop_with_caller() -> None:
    """Have this process told to stop when its caller is gone, if it has one; the handlers of signals are set before."""
    if caller := os.environ.pop(CALLER, None):
        _end_with_parent()
        if os.getppid() != int(caller):  # it is gone already
            os.kill(os.getpid(), signal.SIGTERM)


def ranks_of(settings: Settings, hosts: Sequence[HostSlots]) -> int:
    """Return the number of ranks on these hosts; without any, of those on this machine."""
    return sum(host.slots for host in hosts) or settings.ranks or 1


def program(arguments: Sequence[str]) -> list[str]:
    """Return the command of each rank: this Python, with the words of the user's command."""
    return [sys.executable, "-m", "mpillm", *arguments]


def end_session(launcher: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a start on this machine: mpiexec, and whoever is in its session."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == launcher.pid or os.getsid(process.pid) == launcher.pid:
                process.kill()
    launcher.wait()


def ranks_below(pid: int) -> bool:
    """Return whether mpiexec has ranks on this machine now."""
    with contextlib.suppress(psutil.Error):
        below = psutil.Process(pid).children(recursive=True)
        return any("mpillm" in process.cmdline() for process in below)
    return False


def as_root() -> dict[str, str]:
    """Return the variables without which Open MPI starts no ranks for root; empty for other users."""
    return _AS_ROOT if os.geteuid() == 0 else {}


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process (mpiexec, a supervisor) when the one that started it is gone."""
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGTERM)
