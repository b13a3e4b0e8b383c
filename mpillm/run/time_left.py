"""Estimate the remaining time of a run from the time that it has taken for requests and parts of them."""

from __future__ import annotations

from dataclasses import dataclass

TELLING = 0.05  # part of all requests, and at most one, whose time tells how much is left


@dataclass
class AnswerLengths:
    """The tokens of finished answers, and the tokens that these answers were allowed."""

    used: int = 0
    allowed: int = 0

    def add(self, used: int, allowed: int) -> None:
        """Count a finished answer."""
        self.used += used
        self.allowed += allowed

    def part(self, running: int) -> float:
        """Return the part of their allowed tokens that answers will use.

        Those that run are allowed `running` tokens together, and count as whole ones: short ones finish first.
        """
        allowed = self.allowed + running
        return (self.used + running) / allowed if allowed else 1.0

    def whole(self, prompts: int, allowed: int, generated: int) -> float:
        """Return the tokens that the running requests will have, prompts included; they have generated `generated`.

        What is computed of them, divided by this, is the part of these requests that is done.
        """
        return prompts + generated + self.part(allowed) * (allowed - generated)


class TimeLeft:
    """Requests are taken to be alike: what they took tells what the others take."""

    def __init__(self, total: int, done: int) -> None:
        """`done` of the `total` requests were answered before."""
        self._total, self._done = total, done
        self._begun: float | None = None  # the part of other requests that was computed before, in requests

    def seconds(self, answered: int, begun: float, elapsed: float) -> float | None:
        """Return the seconds left; None as long as nothing tells them.

        In `elapsed` seconds `answered` requests were answered, and parts of others that together make `begun` requests.
        The first call tells what was begun before.
        """
        if self._begun is None:
            self._begun = begun
        computed = answered - self._done + begun - self._begun
        if computed < min(TELLING * self._total, 1.0) or computed <= 0:
            return None
        return elapsed * max(self._total - answered - begun, 0.0) / computed
