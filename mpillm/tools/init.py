"""`mpillm init`: job files, hostfiles, Slurm scripts and pages of the package, written where they are used."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import mpillm
from mpillm.errors import JobError, OutputError
from mpillm.store.directory import make, replacing
from mpillm.store.output import JOURNAL

# What is written: directories of the package, and where they go below the target.
SETS = {
    "docs": {"docs": ".", "docs/pictures": "pictures"},
    "job": {"jobs": "."},
    "hostfile": {"slurm/hosts": "."},
    "slurm": {"slurm": "slurm", "jobs": "jobs"},
}
NEXT = {
    "docs": ["begin with {0}/index.md"],
    "job": ["mpillm launch -n 2 run {0}/quickstart.toml"],
    "hostfile": [
        "put your machines' names into {0}/openmpi.hosts, then, with either MPI:",
        "mpillm launch --hostfile {0}/openmpi.hosts doctor",
    ],
    "slurm": ["cd {0} && sbatch slurm/one-node.sbatch jobs/quickstart.toml"],
}
SITE = """\
# Settings of this site; run.sh reads this file first.
#
# module load openmpi/5.0                              # the site's MPI, and its library for mpi4py:
# export MPI4PY_LIBMPI=/opt/site/openmpi/lib/libmpi.so

: "${{MPILLM_VENV:={venv}}}"   # a virtual environment, or a conda environment
"""


def shipped(name: str) -> Path:
    """Return a directory that comes with the package, such as `jobs`: in a checkout, or as it was installed."""
    package = Path(mpillm.__file__).parent
    for folder in (package / name, package.parent / name):  # beside an installed one others may lie
        if folder.is_dir():
            return folder
    raise JobError(f"This installation has no {name}/; install mpillm again.")


def init(what: str, target: Path) -> list[str]:
    """Write the files of `what` (a key of SETS) into `target`; return sentences and commands that come next.

    Raises
    ------
    OutputError
        If a file is there already, or `target` has the results of a run; nothing is written then.
    """
    if (target / JOURNAL).exists():
        raise OutputError(f"{target} is the output directory of a run; give another directory.")
    files = {
        target / to / path.name: path
        for name, to in SETS[what].items()
        for path in sorted(shipped(name).iterdir())
        if path.is_file() and path.suffix != ".py"
    }
    site = target / "slurm" / "site.sh"
    for path in [*files, *([site] if what == "slurm" else [])]:
        if os.path.lexists(path):
            raise OutputError(
                f"{path} exists already and was not changed; remove it, or give another directory."
            )
    for folder in (target, *target.parents):
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file; give another directory.")
    for path, source in files.items():
        make(path.parent)
        with replacing(path) as file:
            file.write(source.read_bytes())
        path.chmod(0o755 if path.suffix == ".sh" else 0o644)
    if what == "slurm":
        with replacing(site) as file:
            file.write(os.fsencode(SITE.format(venv=shlex.quote(sys.prefix))))
    return [line.format(shlex.quote(str(target))) for line in NEXT[what]]
