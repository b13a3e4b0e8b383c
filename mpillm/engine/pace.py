"""The number of micro-batches: more of them keep more stages busy, and stream the weights more often.

Let each of S stages compute c seconds for all running sequences, and read w seconds for a pass over its streamed
weights. The next token of a sequence needs all stages one after the other. With M micro-batches in flight, 1 <= M <= S,
a round (a token for every sequence) takes S max(w, c / M) and reads each stage's weights M times. So

- if the disk is slower than computing (c < w), M = 1 is as fast as any other number, and reads least;
- if computing is slower, M = S is up to S times as fast, because all stages compute at once;
- if the stages share a disk (ranks of one machine, a file server), w grows with M, and S max(M w, c / M) is least near
  M = sqrt(c / w).

Loading a layer once for several micro-batches in turn would not help: the next stage could not begin before all of them
have passed the last layer. So the number decreases while steps wait for weights for more than half of their time, and
increases while the disk is idle for more than half of it. The rank of the first stage measures its own steps; the other
stages have about the same number of layers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from mpillm.engine.limits import Limits


class Paged(Protocol):
    """A worker whose weights may be streamed."""

    @property
    def paging(self) -> tuple[float, float]:
        """The seconds so far in which it waited for weights, and in which threads loaded them."""


class Pace:
    """Adapts the number of micro-batches, 1 to `limits.micro_batches`; it is the latter if no weights are streamed."""

    def __init__(self, limits: Limits) -> None:
        self.micro_batches = limits.micro_batches
        self._maximum = limits.micro_batches
        self._streams = limits.streams

    @contextmanager
    def measured(self, worker: Paged) -> Iterator[None]:
        """Measure the block, which is a step of `worker`, and adapt the number of micro-batches."""
        if not self._streams:
            yield
            return
        start, (waited, loaded) = time.perf_counter(), worker.paging
        yield
        seconds, now = time.perf_counter() - start, worker.paging
        self.adapt(seconds, now[0] - waited, now[1] - loaded)

    def adapt(self, seconds: float, waited: float, loaded: float) -> None:
        """Adapt to a step of `seconds`, of which it `waited` for weights, while threads loaded for `loaded` seconds."""
        if waited > seconds / 2:
            self.micro_batches = max(self.micro_batches - 1, 1)
        elif loaded < seconds / 2:
            self.micro_batches = min(self.micro_batches + 1, self._maximum)
