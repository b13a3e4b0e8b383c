"""What a run says while it goes on; the command line hands in where and how, rank 0 alone speaks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol


class Bar(Protocol):
    """A count of finished requests."""

    def update(self, answered: int, tokens: int) -> None:
        """`answered` more are finished; `tokens` (prompts' and generated) have been computed in all."""


class Progress(Protocol):
    """How a run speaks."""

    def say(self, line: str) -> None:
        """Say a sentence now."""

    def downloading(self, done: int, total: int) -> None:
        """A model is being fetched: bytes so far, and in all (0 if that is not known)."""

    def requests(self, total: int) -> AbstractContextManager[Bar]:
        """Show the progress of so many requests."""
