"""Find the hosts of the hostfile that ssh, or the agent of mpiexec, can reach."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from mpillm.comm.program import library
from mpillm.comm.rendezvous import own_addresses
from mpillm.errors import JobError
from mpillm.launching.hostfile import HostSlots, read_hosts
from mpillm.launching.mpiexec import Settings
from mpillm.version import with_sources

ANSWER = 10.0  # seconds for a host to answer
LOADS = 60.0  # seconds for its Python to load MPI, which may come from a slow disk
# What a host answers without this Python, if that loads no MPI, and before what it has.
ABSENT, BROKEN, HAS = "mpillm-absent", "mpillm-broken", "mpillm-has"
LOAD = (
    "from mpillm.comm.program import library; from mpillm.version import with_sources; "
    f"print('{HAS}', 'mpillm', with_sources(), 'and', library().name)"
)
PASSED = ("LD_LIBRARY_PATH", "MPI4PY_LIBMPI", "PYTHONPATH")  # MPICH takes them along, and LOAD may need them


class NoHostError(JobError):
    """No host of the hostfile can take ranks; while a run goes on, some may come back."""


def answering(settings: Settings, say: Callable[[str], None]) -> list[HostSlots]:
    """Return the hosts of the hostfile that answer; none without a hostfile, and NoHostError if none answers."""
    if settings.hostfile is None:
        return []
    hosts = read_hosts(settings.hostfile)
    silent = silent_hosts(settings.agent, hosts, loads=True)
    there = [host for host in hosts if host.name not in silent]
    for host, why in silent.items():
        say(f"The host {host} {why}{'; continuing without it' if there else ''}.")
    if not there:
        raise NoHostError(
            f"No host of {settings.hostfile} can take ranks; try: {settings.agent} {hosts[0].name} true"
        )
    return there


def silent_hosts(agent: str, hosts: Sequence[HostSlots], loads: bool = False) -> dict[str, str]:
    """Return the names of the hosts that cannot take ranks, and why each cannot; `loads` as for `why_silent`."""
    names = [host.name for host in hosts]
    with ThreadPoolExecutor(min(64, len(names) or 1)) as pool:
        why = pool.map(lambda name: why_silent(agent, name, loads), names)
        return {name: reason for name, reason in zip(names, why, strict=True) if reason}


def why_silent(agent: str, host: str, loads: bool = False) -> str:
    """Why a host takes no ranks, as the agent (AGENT HOST COMMAND starts a command there) says it; else nothing.

    Without this Python there, Open MPI would end all ranks, and MPICH would wait for the host. With `loads` it is also
    tried whether that loads mpillm and an MPI library.
    """
    if host in ("localhost", "127.0.0.1", socket.gethostname(), *own_addresses()):
        return ""
    words, limit = shlex.split(agent), LOADS if loads else ANSWER
    if words[0].rpartition("/")[2] == "ssh":
        words += ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={ANSWER / 2:.0f}"]
    command = f"test -x {shlex.quote(sys.executable)} || echo {ABSENT}"
    if loads:
        given = [f"{name}={os.environ[name]}" for name in PASSED if name in os.environ]
        # Only where needed: env takes another machine's program for a script.
        env = ["env", *given] if given else []
        command += f"; {shlex.join([*env, sys.executable, '-c', LOAD])} || echo {BROKEN}"
    try:
        done = subprocess.run(
            [*words, host, command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit,
            check=False,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return f"does not answer ({words[0]} did not finish within {limit:.0f} s)"
    except OSError as error:
        return f"does not answer ({words[0]}: {error.strerror})"
    said = [" ".join(line.split()) for line in done.stderr.splitlines() if line.strip()]
    last = said[-1].rstrip(".") if said else ""
    if ABSENT in done.stdout:
        return f"has no {sys.executable}: install mpillm there, in the same directory"
    if BROKEN in done.stdout:
        known = f"{JobError.__module__}.{JobError.__name__}: "  # such an error says itself what to do
        if last.startswith(known):
            return f"cannot start mpillm ({last.removeprefix(known)})"
        return f"cannot start mpillm ({last}); install it there as on this host"
    if (
        loads
        and (has := done.stdout.partition(HAS)[2].strip())
        and has != (ours := f"mpillm {with_sources()} and {library().name}")
    ):
        return f"has {has}, and this host {ours}; install the same there"
    if not done.returncode:
        return ""
    return f"does not answer ({last or f'{words[0]} ended with {done.returncode}'})"
