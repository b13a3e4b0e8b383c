"""Which hosts of the hostfile can be reached by what mpiexec starts its ranks with, which is ssh or the like."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from mpillm.comm.rendezvous import own_addresses
from mpillm.errors import JobError
from mpillm.launching.hostfile import HostSlots, read_hosts
from mpillm.launching.mpiexec import Settings

ANSWER = 10.0  # seconds for a host to answer
ABSENT = "mpillm-absent"  # what a host without this Python answers


class NoHostError(JobError):
    """No host of the hostfile can take ranks; while a run goes on, some may come back."""


def answering(settings: Settings, say: Callable[[str], None]) -> list[HostSlots]:
    """The hosts of the hostfile that answer; none without a hostfile, and NoHostError if none answers."""
    if settings.hostfile is None:
        return []
    hosts = read_hosts(settings.hostfile)
    silent = silent_hosts(settings.agent, hosts)
    there = [host for host in hosts if host.name not in silent]
    for host, why in silent.items():
        say(f"The host {host} {why}{'; continuing without it' if there else ''}.")
    if not there:
        raise NoHostError(
            f"No host of {settings.hostfile} can take ranks; try: {settings.agent} {hosts[0].name} true"
        )
    return there


def silent_hosts(agent: str, hosts: Sequence[HostSlots]) -> dict[str, str]:
    """The names of the hosts that cannot take ranks, and why each cannot."""
    names = [host.name for host in hosts]
    with ThreadPoolExecutor(min(64, len(names) or 1)) as pool:
        why = pool.map(lambda name: why_silent(agent, name), names)
        return {name: reason for name, reason in zip(names, why, strict=True) if reason}


def why_silent(agent: str, host: str) -> str:
    """Why a host takes no ranks, as the agent (AGENT HOST COMMAND starts a command there) says it; else nothing.

    Without this Python there, Open MPI would end all ranks, and MPICH would wait for the host.
    """
    if host in ("localhost", "127.0.0.1", socket.gethostname(), *own_addresses()):
        return ""
    words = shlex.split(agent)
    if words[0].rpartition("/")[2] == "ssh":
        words += ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={ANSWER / 2:.0f}"]
    try:
        done = subprocess.run(
            [*words, host, f"test -x {shlex.quote(sys.executable)} || echo {ABSENT}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ANSWER,
            check=False,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return f"does not answer ({words[0]} did not finish within {ANSWER:.0f} s)"
    except OSError as error:
        return f"does not answer ({words[0]}: {error.strerror})"
    if ABSENT in done.stdout:
        return f"has no {sys.executable}: install mpillm there, in the same directory"
    if not done.returncode:
        return ""
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return f"does not answer ({said[-1].rstrip('.') if said else f'{words[0]} ended with {done.returncode}'})"
