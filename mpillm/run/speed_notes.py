"""A cache of measured speeds in the user's cache directory, so that later runs on the same hosts need not measure.

If a file cannot be read or written, the hosts are measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from mpillm.catalogue.models import cache_dir
from mpillm.errors import JobError, OutputError
from mpillm.planning import pace
from mpillm.planning.speed import Speed
from mpillm.store.directory import replacing

KEPT = 6 * 3600.0  # seconds


class _Noted(msgspec.Struct, frozen=True):
    effort: float
    speeds: Sequence[Speed]
    paces: Sequence[float]


def find(places: Sequence[str], effort: float, paces: Sequence[float]) -> Sequence[Speed] | None:
    """Return the speeds of ranks at these places, if they were measured of late with such an effort or a greater one.

    They count only if all ranks still have about the paces that they had then.
    """
    with contextlib.suppress(OSError, JobError, msgspec.DecodeError):
        path = _path(places)
        if _age(path) < KEPT:
            noted = msgspec.json.decode(path.read_bytes(), type=_Noted)
            return noted.speeds if noted.effort >= effort and pace.same(paces, noted.paces) else None
    return None


def keep(places: Sequence[str], effort: float, speeds: Sequence[Speed], paces: Sequence[float]) -> None:
    """Note what was measured, if that is possible; what is too old to be used goes."""
    with contextlib.suppress(OSError, JobError, OutputError):
        path = _path(places)
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.iterdir():
            if _age(old) > KEPT:
                old.unlink(missing_ok=True)
        with replacing(path) as file:
            file.write(msgspec.json.encode(_Noted(effort, speeds, paces)))


def _path(places: Sequence[str]) -> Path:
    digest = hashlib.blake2b("\0".join(places).encode(), digest_size=12).hexdigest()
    return cache_dir() / "speeds" / f"{digest}.json"


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime
