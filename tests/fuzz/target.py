"""What is fed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Run = Callable[[bytes], None]


@dataclass
class Target:
    """How to feed it, what to begin with, and words that its format knows."""

    run: Run
    seeds: list[bytes]
    words: tuple[bytes, ...] = ()
