"""Lines whose choices are being computed, in whatever order they are finished."""

from __future__ import annotations

from mpillm.batch.work import Work
from mpillm.engine.request import FinishedCompletion


class Pending:
    """The choices of a line that are finished so far."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._completions: dict[int, FinishedCompletion] = {}

    @property
    def completions(self) -> list[FinishedCompletion]:
        """The finished choices, in the order of `work.requests`."""
        return [self._completions[choice] for choice in sorted(self._completions)]

    def take(self, completion: FinishedCompletion) -> list[FinishedCompletion] | None:
        """Keep a finished choice; return all of them, in the order of `work.requests`, if it was the last one."""
        self._completions[completion.request.choice] = completion
        return self.completions if len(self._completions) == len(self.work.requests) else None
