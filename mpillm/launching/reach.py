"""Which hosts of the hostfile can be reached by what mpiexec starts its ranks with, which is ssh or the like."""

from __future__ import annotations

import shlex
import socket
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from mpillm.comm.rendezvous import own_addresses
from mpillm.launching.hostfile import HostSlots, read_hosts
from mpillm.launching.mpiexec import Settings

ANSWER = 10.0  # seconds for a host to answer


def answering(settings: Settings, say: Callable[[str], None]) -> list[HostSlots]:
    """The hosts of the hostfile that answer; all of them if none does, for then mpiexec shall say why."""
    if settings.hostfile is None:
        return []
    hosts = read_hosts(settings.hostfile)
    silent = silent_hosts(settings.agent, hosts)
    for host, why in silent.items():
        say(f"The host {host} does not answer ({why}); continuing without it.")
    return [host for host in hosts if host.name not in silent] or hosts


def silent_hosts(agent: str, hosts: Sequence[HostSlots]) -> dict[str, str]:
    """The names of the hosts that do not answer, and why each does not."""
    names = [host.name for host in hosts]
    with ThreadPoolExecutor(min(64, len(names) or 1)) as pool:
        why = pool.map(lambda name: why_silent(agent, name), names)
        return {name: reason for name, reason in zip(names, why, strict=True) if reason}


def why_silent(agent: str, host: str) -> str:
    """Why a host does not answer, as the agent (AGENT HOST COMMAND starts a command there) says it; else nothing."""
    if host in ("localhost", "127.0.0.1", socket.gethostname(), *own_addresses()):
        return ""
    words = shlex.split(agent)
    if words[0].rpartition("/")[2] == "ssh":
        words += ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={ANSWER / 2:.0f}"]
    try:
        done = subprocess.run(
            [*words, host, "true"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=ANSWER,
            check=False,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return f"{words[0]} did not finish within {ANSWER:.0f} s"
    except OSError as error:
        return f"{words[0]}: {error.strerror}"
    if not done.returncode:
        return ""
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return said[-1].rstrip(".") if said else f"{words[0]} ended with {done.returncode}"
