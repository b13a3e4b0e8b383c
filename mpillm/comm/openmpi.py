"""Set options of Open MPI that its user has not set."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

TRANSPORTS = "OMPI_MCA_btl"
PARAMETERS = "openmpi-mca-params.conf"
DEBIAN = Path("/etc/openmpi")  # where Debian has it


@contextmanager
def starting(library: str, alone: bool, environ: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """In the block, set the options with which Open MPI, in the file `library`, should start; `alone`: one process.

    The transport `btl/ofi` is left out: it serves one-sided messages over libfabric, which no rank sends, and where
    there is no such network it sleeps for a second in each start. Of a process that no mpiexec has started, nobody
    removes what `btl/sm` and the library itself make: the former is left out too, and the latter lies in a folder that
    is removed here. Whatever the user or the site has said about transports stays.
    """
    before = dict(environ)
    files = [Path(library).parent.parent / "etc" / PARAMETERS, DEBIAN / PARAMETERS]
    if home := environ.get("HOME"):
        files.append(Path(home) / ".openmpi" / "mca-params.conf")
    if TRANSPORTS not in environ and not any(_chooses(file) for file in files):
        environ[TRANSPORTS] = "^ofi,sm" if alone else "^ofi"
    with tempfile.TemporaryDirectory(prefix="mpillm-") if alone else nullcontext() as folder:
        if folder is not None:
            environ["TMPDIR"] = folder
        try:
            yield
        finally:
            for name in {TRANSPORTS, "TMPDIR"} & environ.keys():
                del environ[name]
            environ.update(before)


def _chooses(file: Path) -> bool:
    """Return whether a file of parameters sets the transports, or names other files."""
    try:
        text = file.read_text("utf-8", "replace")
    except OSError:
        return False
    return re.search(r"^\s*(btl|mca_base_param_files)\s*=", text, re.MULTILINE) is not None
