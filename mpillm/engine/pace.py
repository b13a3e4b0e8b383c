"""Into how many micro-batches the running sequences are divided: what keeps stages busy costs passes over the weights.

Take S stages, of which each computes c seconds on all running sequences and reads w seconds for a pass over its
streamed weights. A sequence's next token needs all stages one after the other, so with M micro-batches in flight a
round (a token for every sequence) takes S max(w, c / M) for 1 <= M <= S, and reads each stage's weights M times. So

- where the disk is slower than computing (c < w), M = 1 is as fast as any, and reads least;
- where computing is slower, M = S is up to S times as fast: all stages compute at once;
- where the stages share a disk (ranks of one machine, a file server), w grows with M, and S max(M w, c / M) is least
  near M = sqrt(c / w).

To load a layer once for several micro-batches in turn would not help: the next stage could not begin before the last
layer's turn. So the number goes down while steps wait for weights more than they compute, and up while the disk
rests more than it reads. The first stage's rank measures its own steps; the others have the same number of layers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from mpillm.engine.limits import Limits


class Paged(Protocol):
    """Whose weights may be streamed."""

    @property
    def paging(self) -> tuple[float, float]:
        """Seconds so far of waiting for weights, and of loading them."""


class Pace:
    """The number of micro-batches, from 1 to `limits.micro_batches`; always the latter if no weights are streamed."""

    def __init__(self, limits: Limits) -> None:
        self.micro_batches = limits.micro_batches
        self._maximum = limits.micro_batches
        self._streams = limits.streams

    @contextmanager
    def measured(self, worker: Paged) -> Iterator[None]:
        """The block is a step of `worker`'s."""
        if not self._streams:
            yield
            return
        start, (waited, loaded) = time.perf_counter(), worker.paging
        yield
        seconds, now = time.perf_counter() - start, worker.paging
        self.adapt(seconds, now[0] - waited, now[1] - loaded)

    def adapt(self, seconds: float, waited: float, loaded: float) -> None:
        """Take note of a step that took `seconds`, of which it `waited`, while threads loaded for so many seconds."""
        if waited > seconds / 2:
            self.micro_batches = max(self.micro_batches - 1, 1)
        elif loaded < seconds / 2:
            self.micro_batches = min(self.micro_batches + 1, self._maximum)
