"""Who runs in this step: continuous batching over a fixed number of KV blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from mpillm.engine.sequence import Sequence
from mpillm.kernels import KV_BLOCK


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step and the KV cache can take."""

    n_blocks: int  # KV blocks of `KV_BLOCK` tokens, the same number on every rank
    max_sequences: int  # in one step
    max_tokens: int  # in one step
    micro_batches: int  # steps in flight at once: one for each stage keeps all of them busy


def blocks_for(tokens: int) -> int:
    """KV blocks that hold `tokens` tokens."""
    return -(-tokens // KV_BLOCK)


class Scheduler:
    """Admits sequences in order while their blocks fit, and fills each step: decoding first, then prompts in chunks.

    A sequence gets all the blocks that it can come to need when it is admitted, so none is ever evicted and no
    two can wait for each other; who does not fit yet waits.
    """

    def __init__(self, limits: Limits, waiting: Iterator[Sequence]) -> None:
        self.limits = limits
        self.running: list[Sequence] = []
        self._waiting = waiting  # taken from one by one: a job's sequences need not all be in memory
        self._next = next(waiting, None)  # the first in the queue
        self._free = list(range(limits.n_blocks - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        """Whether any sequence is not finished."""
        return self._next is not None or bool(self.running)

    @property
    def blocks_in_use(self) -> int:
        """KV blocks that sequences hold now."""
        return self.limits.n_blocks - len(self._free)

    def next(self) -> list[tuple[Sequence, int]]:
        """The next step's sequences with how many tokens of each to compute; empty if all are in flight."""
        limits = self.limits
        self._admit()
        free = [sequence for sequence in self.running if not sequence.in_flight]
        share = -(-len(self.running) // limits.micro_batches)  # leave the others for the micro-batches behind
        free = free[: min(share, limits.max_sequences)]
        budget = limits.max_tokens
        chosen = []
        for decoding in (True, False):
            for sequence in free:
                left = len(sequence.tokens) - sequence.computed
                if (left == 1) is decoding and budget > 0:
                    count = min(left, budget)
                    budget -= count
                    chosen.append((sequence, count))
        for sequence, _ in chosen:
            sequence.in_flight = True
        return chosen

    def release(self, sequence: Sequence) -> None:
        """Take a finished sequence out and its blocks back."""
        self.running.remove(sequence)
        self._free.extend(reversed(sequence.blocks))
        sequence.blocks = []

    def _admit(self) -> None:
        most = self.limits.max_sequences * self.limits.micro_batches
        while self._next is not None and len(self.running) < most:
            sequence = self._next
            need = blocks_for(sequence.max_length)
            assert need <= self.limits.n_blocks, "a job refuses beforehand what could never run"
            if need > len(self._free):
                return
            sequence.blocks = [self._free.pop() for _ in range(need)]
            sequence.started = time.monotonic()
            self.running.append(sequence)
            self._next = next(self._waiting, None)
