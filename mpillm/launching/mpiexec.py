"""The command that starts ranks with mpiexec, and the end of what it started."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil

from mpillm.comm.launch import Library
from mpillm.launching.hostfile import HostSlots

AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


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
    survivors: bool = True,
) -> list[str]:
    """mpiexec with what this MPI needs: more ranks than cores allowed, nothing bound to one core, the agent.

    Where it can (Open MPI 5), it lets the `survivors` go on when a rank dies, and keeps its session in `folder`: in the
    system's folder for temporary files, what a killed mpiexec left stops a later one that has its process id. Without
    a folder it uses the system's.
    """
    mpiexec = str(library.mpiexec() or "mpiexec")
    if library.name == "MPICH":
        words = [mpiexec, *(["-f", str(hostfile)] if hostfile else [])]
        words += ["-launcher", "ssh", "-launcher-exec", settings.agent] if settings.agent != "ssh" else []
    else:
        words = [mpiexec, "--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none"]
        if library.version >= (5,):
            words += ["--with-ft", "ulfm"] if survivors else []
            words += ["--prtemca", "prte_local_tmpdir_base", str(folder)] if folder else []
        words += ["--hostfile", str(hostfile)] if hostfile else []
        words += ["--prtemca", "plm_ssh_agent", settings.agent] if settings.agent != "ssh" else []
    return [*words, *settings.mpi_options, "-n", str(ranks)]


def become(
    library: Library,
    settings: Settings,
    hosts: Sequence[HostSlots],
    program: Sequence[str],
    survivors: bool = True,
) -> NoReturn:
    """Become mpiexec, which has this process's terminal and signals: nothing starts its ranks again.

    Without `survivors` all ranks end with the first that dies, and Open MPI prints a banner below what it has said.
    """
    ranks = sum(host.slots for host in hosts) or settings.ranks or 1
    words = command(library, settings, ranks, None, None, survivors)
    if hosts:
        named = ",".join(f"{host.name}:{host.slots}" for host in hosts)
        words[1:1] = ["-hosts" if library.name == "MPICH" else "--host", named]
    if os.geteuid() == 0:
        os.environ.update(AS_ROOT)
    os.execvp(words[0], [*words, *program])


def program(arguments: Sequence[str]) -> list[str]:
    """The command of each rank: this Python, with the words of the user's command."""
    return [sys.executable, "-m", "mpillm", *arguments]


def end_session(launcher: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a start on this machine: mpiexec, and whoever is in its session."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == launcher.pid or os.getsid(process.pid) == launcher.pid:
                process.kill()
    launcher.wait()
