"""What a run says while it goes on; the command line hands in where and how, rank 0 alone speaks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ProgressState:
    """How a run goes, as rank 0 knows it. Parts are of 1."""

    tokens: int  # that went through the model so far, prompts' and generated
    # How often paged weights were in memory when they were used, 0 to 1; None if nothing is paged.
    hits: float | None
    stalled: float  # part of the time in which this rank waited for weights
    waited: float  # part of the time in which it waited for other ranks
    # Tokens of a sequence for each pass that drew any; None if no drafts helped.
    per_pass: float | None = None
    begun: float = 0.0  # requests' worth that is computed of requests without an answer


class Bar(Protocol):
    """A count of finished requests."""

    def update(self, answered: int, state: Callable[[], ProgressState]) -> None:
        """`answered` more are finished; `state` is called if it is to be shown now. Call it after every step."""


class Progress(Protocol):
    """What a run tells its user."""

    def say(self, line: str) -> None:
        """Say a sentence now."""

    def downloading(self, done: int, total: int) -> None:
        """A model is being fetched: bytes so far, and in all (0 if that is not known)."""

    def requests(self, total: int, done: int, tokens: int) -> AbstractContextManager[Bar]:
        """Show the progress of `total` requests, `done` of them before; `tokens` as the state has them already."""
