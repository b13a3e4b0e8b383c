"""The interface by which rank 0 reports progress; the command line implements it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Slowest:
    """The rank that the others wait for."""

    name: str  # such as "rank 2 on pi3"
    busy: float  # the share of the last seconds in which it computed or waited for its disk


@dataclass(frozen=True, slots=True)
class ProgressState:
    """The progress of a run, as rank 0 knows it. Shares are between 0 and 1."""

    tokens: int  # computed tokens, of prompts and answers
    # The share of cache hits of paged weights; None if nothing is paged.
    hits: float | None
    stalled: float  # the share of the time in which this rank waited for weights
    waited: float  # the share of the time in which it waited for other ranks
    # The mean number of tokens that a step draws for a sequence; None if no drafts helped.
    per_pass: float | None = None
    left: float | None = None  # the seconds that it still needs; None as long as nothing tells them
    slowest: Slowest | None = None  # None if no rank is clearly slower than the others


class Bar(Protocol):
    """A count of finished requests."""

    def update(self, answered: int, state: Callable[[], ProgressState]) -> None:
        """Count `answered` more requests, after every step; calls `state` only if the display is due."""


class Progress(Protocol):
    """Shows the progress of a run to its user."""

    def say(self, line: str) -> None:
        """Show a sentence."""

    def downloading(self, done: int, total: int) -> None:
        """Show the progress of a download: bytes so far, and in total (0 if unknown)."""

    def requests(self, total: int, done: int, tokens: int, since: float) -> AbstractContextManager[Bar]:
        """Show the progress of `total` requests, of which `done` are done and `tokens` tokens computed.

        `since` is when the ranks began to compute (time.monotonic()), also if another rank was rank 0 then.
        """
