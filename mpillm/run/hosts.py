"""hosts.toml: machines on paper, for `mpillm plan --hosts`.

[[hosts]]
name = "pi"          # for people
count = 4            # so many that are alike
ranks = 1            # on each
memory = "7GiB"      # that is free on each
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from mpillm.errors import JobError
from mpillm.run.layout import Machines
from mpillm.spec import byte_size
from mpillm.spec.reading import toml

Positive = Annotated[int, Meta(ge=1, le=2**20)]


class Host(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the file."""

    memory: str | int
    name: str = ""
    count: Positive = 1
    ranks: Positive = 1

    def __post_init__(self) -> None:
        byte_size(self.memory)  # ValueError says what is wrong with it


class Hosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file."""

    hosts: Annotated[list[Host], Meta(min_length=1)]


def read(path: Path, ranks: int | None = None) -> Machines:
    """The machines of the first `ranks` ranks of a file, or of all; JobError says what is wrong with it."""
    try:
        found = msgspec.convert(toml(path.read_text("utf-8")), Hosts)
    except OSError as error:
        raise JobError(f"The file of hosts {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # msgspec's and TOML's are such
        raise JobError(f"The file of hosts {path} is wrong: {error}.") from None
    per_host, free = list[int](), list[int]()
    for host in found.hosts:
        for _ in range(host.count):
            used = host.ranks if ranks is None else min(host.ranks, ranks - len(free))
            if used:
                per_host.append(used)
                free += [byte_size(host.memory) // used] * used
    if ranks is not None and len(free) < ranks:
        raise JobError(
            f"The hosts of {path} have {len(free)} ranks, not {ranks}; add hosts, or ask for fewer."
        )
    return Machines(per_host, free)
