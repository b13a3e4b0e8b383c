"""The version of mpillm."""

import os
import zlib
from collections.abc import Iterator

__version__ = "0.1.0"


def with_sources() -> str:
    """Return the version; in a checkout with a checksum of the sources' names and sizes, to tell checkouts apart."""
    package = os.path.dirname(os.path.abspath(__file__))
    if not os.path.exists(os.path.join(package, "..", ".git")):
        return __version__
    return f"{__version__} (sources {zlib.crc32(repr(sorted(_sizes(package))).encode()):08x})"


def _sizes(folder: str, inside: str = "") -> Iterator[tuple[str, int]]:
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from _sizes(entry.path, f"{inside}{entry.name}/")
        elif entry.name.endswith(".py"):
            yield inside + entry.name, entry.stat().st_size
