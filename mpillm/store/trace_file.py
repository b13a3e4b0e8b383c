"""The file of a trace: JSON in Chrome's trace format, which Perfetto opens.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU ("Trace Event Format")
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from mpillm.store.directory import replacing
from mpillm.tracing import Span, Sum

NOTE = (
    "A process is a rank. Only the last spans of each rank are here (kept); sums are of all: seconds by name. "
    "Ranks on several hosts are put together by the hosts' clocks of the day."
)

MAIN = threading.main_thread().name


@dataclass
class RankTrace:
    """The record of a rank."""

    rank: int
    host: str
    ahead: float  # seconds that the clock of the day is ahead of the spans' clock
    sums: dict[str, Sum]
    spans: list[Span]


def write(path: Path, ranks: list[RankTrace]) -> None:
    """Write a trace of all ranks; OutputError if that fails."""
    ahead = [rank.ahead - ranks[0].ahead for rank in ranks]
    first = min(
        (span.start + more for rank, more in zip(ranks, ahead, strict=True) for span in rank.spans),
        default=0.0,
    )
    with replacing(path) as file:
        file.write(b'{"displayTimeUnit":"ms","traceEvents":[')
        for number, event in enumerate(_events(ranks, [more - first for more in ahead])):
            file.write(b",\n" if number else b"\n")
            file.write(msgspec.json.encode(event))
        file.write(b'\n],"otherData":')
        file.write(msgspec.json.encode({"note": NOTE, "ranks": [_described(rank) for rank in ranks]}))
        file.write(b"}\n")


def _events(ranks: list[RankTrace], later: list[float]) -> Iterator[dict[str, Any]]:
    for rank, more in zip(ranks, later, strict=True):
        spans = sorted(rank.spans, key=lambda span: span.start)
        # The thread that computes comes first, those that load weights as they began.
        threads = sorted(dict.fromkeys(span.thread for span in spans), key=lambda thread: thread[1] != MAIN)
        # Perfetto takes the process 0 and the thread 0 for the kernel's.
        process, numbers = rank.rank + 1, {thread: number for number, thread in enumerate(threads, 1)}
        yield _named("process_name", process, 1, f"rank {rank.rank} on {rank.host}")
        for thread, number in numbers.items():
            yield _named("thread_name", process, number, thread[1])
        for span in spans:
            # Both ends are rounded in the same way, so nested spans stay nested.
            begin, end = (round(1e9 * (at + more)) for at in (span.start, span.start + span.seconds))
            event = {
                "ph": "X",
                "name": span.name,
                "pid": process,
                "tid": numbers[span.thread],
                "ts": begin / 1000,
                "dur": (end - begin) / 1000,
            }
            yield {**event, "args": span.detail} if span.detail else event


def _named(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}


def _described(rank: RankTrace) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "host": rank.host,
        "spans": sum(each.count for each in rank.sums.values()),
        "kept": len(rank.spans),
        "sums": rank.sums,
    }
