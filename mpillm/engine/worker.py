"""The worker of a rank: it computes the rank's share of each step that the leader of its replica sends."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from mpillm import tracing
from mpillm.comm.channel import Channel
from mpillm.engine import messages
from mpillm.engine.messages import Fetch, Stop
from mpillm.engine.reply import Reply, ReplyBuilder
from mpillm.engine.step import Step
from mpillm.model.decoder import Decoder


class Worker:
    """Computes a rank's share of steps; leader and followers each have one."""

    def __init__(
        self,
        decoder: Decoder,
        micro_batches: int,
        threads: int,
        computing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`computing` is entered for each message: that of the world, so that a rank that hangs there is ended."""
        self.decoder, self._computing = decoder, computing
        self.seconds = 0.0  # the time of all steps, including waits
        self.longest = 0.0  # the time of the longest step, in seconds
        self._replies = ReplyBuilder(decoder, keep_steps=micro_batches, threads=threads)

    def compute(self, message: Step | Fetch) -> Reply | None:
        """Compute this rank's share of a message; return the reply on a rank of the last stage, else None."""
        with self._computing():
            if isinstance(message, Step):
                return self.step(message)
            return self._replies.fetch(message) if self.decoder.is_last else None

    def step(self, step: Step) -> Reply | None:
        """Compute this rank's share of a step; return the reply on a rank of the last stage, else None."""
        if self.seconds:  # the first step's tokens do not wait for it
            self.decoder.renew_weights()
        start = time.perf_counter()
        x = self.decoder.forward(step.batch())
        reply = None if x is None else self._replies.build(step, x)
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self.longest = max(self.longest, seconds)
        if tracing.active():
            rows = [len(chunk.tokens) for chunk in step.chunks]
            tracing.add(_phase(rows), start, seconds, step=step.number, sequences=len(rows), tokens=sum(rows))
        self.decoder.note_step(seconds)
        return reply

    def let_go(self) -> None:
        """Release the layers, their weights and their KV cache; no steps may follow."""
        del self.decoder, self._replies

    @property
    def paging(self) -> tuple[float, float]:
        """The seconds so far in which it waited for weights, and in which threads loaded them."""
        return self.decoder.paging


def follow(worker: Worker, channel: Channel, check: Callable[[], object] = lambda: None) -> int:
    """Compute the leader's messages until it sends `Stop`; return the exit code. Calls `check` before each message."""
    while True:
        check()
        message = messages.decode(channel.take())
        if isinstance(message, Stop):
            return message.exit_code
        reply = worker.compute(message)
        if reply is not None:
            channel.reply(reply.encode())


def _phase(rows: list[int]) -> str:
    """Return the name of a step in a trace; `rows` are the numbers of tokens of the chunks."""
    prompts = sum(count > 1 for count in rows)
    return "decode" if not prompts else "prefill" if prompts == len(rows) else "prefill and decode"
