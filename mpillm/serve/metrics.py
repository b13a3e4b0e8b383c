"""The metrics of the server for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from mpillm.engine.limits import Totals
from mpillm.serve.arrivals import Arrivals

# Fields of the engine's totals, which count what clients and batches ask for, whether or not they wait for its end.
TOTALS = {
    "steps": "Steps of the engine",
    "prompt_tokens": "Tokens of prompts that were computed",
    "shared_tokens": "Tokens of prompts that were shared with another request",
    "generated_tokens": "Generated tokens",
    "preemptions": "Preemptions of sequences",
}


class EngineTotals(Collector):
    """The engine's totals as counters."""

    def __init__(self, totals: Totals) -> None:
        self._totals = totals

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield each counter."""
        for name, text in TOTALS.items():
            yield CounterMetricFamily(f"mpillm_{name}", text, value=getattr(self._totals, name))


class Metrics:
    """Counters of requests and tokens, and gauges of what runs now."""

    def __init__(self, totals: Totals) -> None:
        """`totals` are the engine's."""
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "mpillm_requests",
            "Requests that have ended, by the status of the whole answer (499: the client had gone)",
            ["endpoint", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "mpillm_request_seconds",
            "Seconds until an answer, or the first byte of a stream",
            ["endpoint"],
            registry=self._registry,
        )
        self._waiting = Gauge("mpillm_waiting", "Requests that wait for the engine", registry=self._registry)
        self._running = Gauge("mpillm_running", "Choices that are being computed", registry=self._registry)
        self._registry.register(EngineTotals(totals))

    def began(self, endpoint: str, seconds: float) -> None:
        """Count the time until an answer, or until a stream begins."""
        self._seconds.labels(endpoint).observe(seconds)

    def ended(self, endpoint: str, status: int) -> None:
        """Count a request that has ended."""
        self._requests.labels(endpoint, str(status)).inc()

    def described(self) -> Iterator[tuple[str, str]]:
        """Yield the name of each metric as Prometheus shows it, and what it is."""
        for metric in self._registry.collect():
            yield metric.name + ("_total" if metric.type == "counter" else ""), metric.documentation

    def exposition(self, arrivals: Arrivals) -> tuple[bytes, str]:
        """Return the text that Prometheus reads, and its content type."""
        self._waiting.set(arrivals.waiting)
        self._running.set(arrivals.running)
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
