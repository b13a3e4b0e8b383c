"""Show the progress of a run: a live line on a terminal, a new line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable

from tqdm import tqdm

from mpillm.cli import terminal
from mpillm.run.progress import ProgressState
from mpillm.words import count_of

LIVE, LINES = 0.2, 5.0  # seconds between two looks at a terminal, and between two lines elsewhere
FORM = "{n_fmt}/{total_fmt} requests {percentage:3.0f}% [{elapsed}<LEFT{postfix}] {bar}"  # tqdm's words
BEFORE = FORM.replace("<LEFT", "")  # anything tells how much time is left
BESIDE = " requests 100% [0:00:00<0:00:00, "  # the characters of a live line besides its numbers
AFTER = "^C "  # what the terminal shows behind it when it is stopped
WINDOW = 10.0  # seconds that the rate of now is taken over


class Rates:
    """Tokens per second: over all of the run, and over its last seconds."""

    def __init__(self, tokens: int = 0) -> None:
        """`tokens` have been computed before."""
        self._started, self._before = time.monotonic(), tokens
        self._seen = deque([(self._started, tokens)])

    def add(self, tokens: int) -> None:
        """Note how many tokens have been computed in all."""
        now = time.monotonic()
        self._seen.append((now, tokens))
        while len(self._seen) > 2 and self._seen[1][0] < now - WINDOW:
            self._seen.popleft()

    @property
    def elapsed(self) -> float:
        """Seconds from the beginning to the last `add`."""
        return self._seen[-1][0] - self._started

    def __str__(self) -> str:
        (before, had), (now, has) = self._seen[0], self._seen[-1]
        overall = (has - self._before) / self.elapsed if self.elapsed else 0.0
        lately = (has - had) / (now - before) if now > before else 0.0
        return f"{overall:.0f} tokens/s ({lately:.0f} now)"


def _waits_and_drafts(state: ProgressState, capacity: float = float("inf")) -> str:
    """Return the waits, the slowest rank and the gain of drafts, as far as there is room; "" if all is well."""
    parts = [] if state.hits is None else [f"hits {100 * state.hits:.0f} %"]
    if (state.per_pass or 0.0) >= 1.05:  # else it reads 1.0
        parts.append(f"{state.per_pass:.1f} tokens/pass")
    if state.slowest is not None:
        parts.append(f"slowest: {state.slowest.name} (busy {100 * state.slowest.busy:.0f} %)")
    for what, part in (("waits for disk", state.stalled), ("waits for ranks", state.waited)):
        if part >= 0.005:
            parts.append(f"{what} {100 * part:.0f} %")
    told = ""
    for text in parts:
        if len(told) + len(text) + 2 <= capacity:
            told += f", {text}"
    return told


def width() -> int | None:
    """Return the columns of a live line; None if nothing tells them."""
    columns = terminal.columns(sys.stderr)
    return None if columns is None else columns - len(AFTER)


class Live:
    """A line on a terminal that is drawn anew."""

    def __init__(self, bar: tqdm, rates: Rates) -> None:
        """The bar has the form `BEFORE`, and a postfix with rates."""
        self._bar, self._rates, self._shown = bar, rates, 0.0
        self._bar.dynamic_ncols = lambda _: (width(), None)  # tqdm calls it for the columns and rows

    def update(self, answered: int, state: Callable[[], ProgressState]) -> None:
        self._bar.n += answered
        if time.monotonic() < self._shown + LIVE and self._bar.n < self._bar.total:
            return
        now = state()
        self._rates.add(now.tokens)
        if now.left is not None:
            self._bar.bar_format = FORM.replace("LEFT", tqdm.format_interval(now.left))
        capacity = float("inf")
        if (columns := width()) is not None:  # else the end of a line that is too long would be cut off
            capacity = columns - len(f"{self._bar.n}/{self._bar.total}{BESIDE}{self._rates}]")
        self._bar.set_postfix_str(f"{self._rates}{_waits_and_drafts(now, capacity)}", refresh=False)
        self._bar.refresh()
        self._shown = time.monotonic()


class ProgressLines:
    """A sentence every few seconds, for logs and pipes."""

    def __init__(self, total: int, say: Callable[[str], None], done: int, rates: Rates) -> None:
        """`done` of the requests were answered before."""
        self._total, self._say = total, say
        self._answered, self._rates, self._said = done, rates, time.monotonic()

    def update(self, answered: int, state: Callable[[], ProgressState]) -> None:
        self._answered += answered
        if time.monotonic() < self._said + LINES:
            return
        self._said, now = time.monotonic(), state()
        self._rates.add(now.tokens)
        left = "" if now.left is None else f", {tqdm.format_interval(now.left)} left"
        part = 100 * self._answered / self._total if self._total else 100
        self._say(
            f"{self._answered} of {count_of(self._total, 'request')} ({part:.0f} %), "
            f"{self._rates}{left}{_waits_and_drafts(now)}"
        )
