"""Finds installed kernels for a checkout that has none compiled, if they were compiled from the same sources.

Python finds `mpillm` in the current directory first, so a checkout hides the package that `pip install` built. The
build records a digest of what it compiled (`setup.py`), and a checkout compares it with the digest of its own sources.
"""

from __future__ import annotations

import sys
from hashlib import sha256
from pathlib import Path

RECORD = "sources.sha256"  # beside the compiled modules
GENERATED = "declarations.pxi"


def sources_digest(cython: Path) -> str:
    """Return the SHA-256, in hexadecimal, of the names and contents of the sources in the directory `cython`."""
    found = sha256()
    files = [path for pattern in ("*.py", "*.pyx", "*.pxi", "core/*.[ch]") for path in cython.glob(pattern)]
    for path in sorted(files):
        if path.name != GENERATED:
            data = path.read_bytes()
            found.update(f"{path.relative_to(cython)} {len(data)}\n".encode() + data)
    return found.hexdigest()


def installed_kernels(own: Path) -> tuple[Path | None, str]:
    """Return the directory of the installed kernels for the checkout whose `mpillm/kernels` is `own`, or why none fits.

    The result is (None, "") if nothing is installed, or if `own` does not belong to a checkout.
    """
    cython = own.parents[1] / "cython"
    if not cython.is_dir():
        return None, ""
    for entry in dict.fromkeys(Path(entry).resolve() / "mpillm" / "kernels" for entry in sys.path):
        record = entry / RECORD
        if entry == own or not record.is_file():
            continue
        if record.read_text().strip() == sources_digest(cython):
            return entry, ""
        return None, f"those in {entry} were compiled from other sources: install this checkout again"
    return None, ""
