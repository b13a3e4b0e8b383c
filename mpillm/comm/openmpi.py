"""What Open MPI is told where its user has said nothing."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from pathlib import Path

TRANSPORTS = "OMPI_MCA_btl"
PARAMETERS = "openmpi-mca-params.conf"
DEBIAN = Path("/etc/openmpi")  # where Debian has it


def leave_out_one_sided(library: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Leave the transport `btl/ofi` of the Open MPI whose file `library` is out of MPI_Init.

    It serves one-sided messages over libfabric, which no rank sends, and where there is no such network it sleeps for
    a second in each start. Whatever the user or the site has said about transports stays.
    """
    files = [Path(library).parent.parent / "etc" / PARAMETERS, DEBIAN / PARAMETERS]
    if home := environ.get("HOME"):
        files.append(Path(home) / ".openmpi" / "mca-params.conf")
    if TRANSPORTS not in environ and not any(_chooses(file) for file in files):
        environ[TRANSPORTS] = "^ofi"


def _chooses(file: Path) -> bool:
    """Whether a file of parameters has the transports, or names other files."""
    try:
        text = file.read_text("utf-8", "replace")
    except OSError:
        return False
    return re.search(r"^\s*(btl|mca_base_param_files)\s*=", text, re.MULTILINE) is not None
