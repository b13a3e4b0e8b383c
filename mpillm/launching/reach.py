"""Whether a host of the hostfile can be reached by what mpiexec starts its ranks with, which is ssh or the like."""

from __future__ import annotations

import shlex
import socket
import subprocess

from mpillm.comm.rendezvous import own_addresses

ANSWER = 10.0  # seconds for a host to answer


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
