"""Hostfiles: which machines a run is started on, and how many ranks each takes, in Open MPI's words or MPICH's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpillm.comm.launch import Library
from mpillm.errors import JobError
from mpillm.foreign import alike


@dataclass(frozen=True)
class HostSlots:
    """A line of a hostfile: a name or an address, and how many ranks it takes."""

    name: str
    slots: int


def read_hosts(path: Path) -> list[HostSlots]:
    """Return the hosts of a hostfile, as Open MPI (`node1 slots=2`) or MPICH (`node1:2`) has it; JobError if none."""
    try:
        lines = [line.partition("#")[0].strip() for line in hostfile_text(path).splitlines()]
    except FileNotFoundError:
        meant = alike(path) or "mpillm init hostfile DIR writes one."
        if "," in path.name:
            meant = "write the hosts into a file, one in a line, and type --hostfile FILE."
        raise JobError(f"The hostfile {path} does not exist; {meant}") from None
    except IsADirectoryError:
        there = sorted(path.glob("*.hosts"))
        meant = (
            f"give a hostfile, such as {there[0]}" if there else "mpillm init hostfile DIR writes a hostfile"
        )
        raise JobError(f"{path} is a directory; {meant}.") from None
    except OSError as error:
        raise JobError(f"The hostfile {path} cannot be read: {error.strerror}.") from None
    hosts = []
    for line in filter(None, lines):
        found = re.fullmatch(r"([^\s:,]+)(?::([0-9]{1,6})|\s+slots\s*=\s*([0-9]{1,6}))?", line)
        if not found:
            raise JobError(
                f"The hostfile {path} has the line {line[:100]!r}; write 'node1 slots=2' or 'node1:2', a line for each "
                "host."
            )
        slots = int(found[2] or found[3] or 1)
        if not slots:
            raise JobError(
                f"The hostfile {path} gives {found[1]} no slots; give it some, or remove its line."
            )
        hosts.append(HostSlots(found[1], slots))
    if not hosts:
        raise JobError(
            f"The hostfile {path} names no host; write 'node1 slots=2' into it, a line for each host."
        )
    return hosts


def hostfile_text(path: Path) -> str:
    """Return the text of a hostfile, whose comments may be in any encoding; OSError if it cannot be read."""
    return path.read_text("utf-8", errors="surrogateescape")


def write_hosts(path: Path, hosts: Sequence[HostSlots], library: Library) -> None:
    """Write a hostfile in the words of the MPI at hand."""
    form = "{}:{}" if library.name == "MPICH" else "{} slots={}"
    path.write_text("".join(form.format(host.name, host.slots) + "\n" for host in hosts), "utf-8")
