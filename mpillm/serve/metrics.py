"""What Prometheus reads of the server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from mpillm.batch.work import Work
from mpillm.engine.limits import Totals
from mpillm.engine.request import FinishedCompletion
from mpillm.serve.arrivals import Arrivals


class Metrics:
    """Counters of requests and tokens, and gauges of what runs now."""

    def __init__(self, totals: Totals) -> None:
        """`totals` are the engine's."""
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "mpillm_requests", "Answered requests", ["endpoint", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "mpillm_request_seconds",
            "Seconds until an answer, or the first byte of a stream",
            ["endpoint"],
            registry=self._registry,
        )
        self._prompt = Counter("mpillm_prompt_tokens", "Tokens of answered prompts", registry=self._registry)
        self._generated = Counter("mpillm_generated_tokens", "Generated tokens", registry=self._registry)
        self._waiting = Gauge("mpillm_waiting", "Requests that wait for the engine", registry=self._registry)
        self._running = Gauge("mpillm_running", "Choices that are being computed", registry=self._registry)
        for name, text in (
            ("steps", "Steps of the engine"),
            ("shared_tokens", "Tokens of prompts that were shared with another request"),
            ("preemptions", "Preemptions of sequences"),
        ):
            gauge = Gauge(f"mpillm_{name}", text, registry=self._registry)
            gauge.set_function(partial(getattr, totals, name))

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def count(self, work: Work, completions: Sequence[FinishedCompletion]) -> None:
        """Count the tokens of an answer."""
        self._prompt.inc(work.prompt_tokens)
        self._generated.inc(sum(len(completion.tokens) for completion in completions))

    def described(self) -> Iterator[tuple[str, str]]:
        """The name of each metric as Prometheus shows it, and what it is."""
        for metric in self._registry.collect():
            yield metric.name + ("_total" if metric.type == "counter" else ""), metric.documentation

    def exposition(self, arrivals: Arrivals) -> tuple[bytes, str]:
        """The text that Prometheus reads, and its content type."""
        self._waiting.set(arrivals.waiting)
        self._running.set(arrivals.running)
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
