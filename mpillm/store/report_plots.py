"""The plots of a report: which ones a run has, with their tables, and the files of them."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mpillm.comm.counters import WAITED_FOR
from mpillm.store.directory import make, replacing
from mpillm.store.hdf5 import existing_file
from mpillm.store.report import BUSY, RankStatistics, Report
from mpillm.store.report_drawing import (
    Plot,
    Row,
    bars_height,
    draw_beside,
    draw_histogram,
    draw_rates,
    draw_stacked,
)
from mpillm.store.results import HDF5, TIMINGS

# What the page calls what report.json counts: seconds by what they went to, bytes by the message they were in.
SECONDS = BUSY | {kind: f"waiting for {what}" for kind, what in WAITED_FOR.items()}
MESSAGES = {
    "all_reduce": "sums over shards", "pipe": "activations to the next stage", "step": "steps", "reply": "replies",
    "requests": "requests and answers",
}  # fmt: skip
ELSE = "everything else"  # that a rank does while the run computes, such as reading lines and drawing tokens
USES = {"hits": "found in memory", "misses": "loaded"}
BINS = 30  # bins of a histogram


def available() -> bool:
    """Return whether there is matplotlib."""
    return find_spec("matplotlib") is not None


def plots(report: Report, directory: Path) -> Iterator[Plot]:
    """Yield the plots of a run, whose files are in `directory`; those that would be empty are left out."""
    if len(report.timeline) > 1 and len((throughput := _throughput(report.timeline)).rows) > 1:
        yield throughput
    seconds = dict(SECONDS)
    if report.replicas == 1:
        del seconds["requests"]
    if any(rank.seconds.get("compute") for rank in report.ranks):
        seconds[ELSE] = ELSE
    yield from _by_rank(
        "seconds", "Time of each rank", seconds, report, partial(_seconds_of, report), unit="seconds"
    )
    yield from _by_rank("bytes", "Sent by each rank", MESSAGES, report, _sent, unit="bytes")
    if report.batch.streamed:  # else each page is loaded once
        yield from _by_rank(
            "weights",
            "Uses of paged weights",
            USES,
            report,
            lambda rank, kind: rank.weights.get(kind, 0),
            unit="uses",
        )
    yield from _by_rank(
        "experts", "Uses of experts", USES, report, lambda rank, kind: rank.experts.get(kind, 0), unit="uses"
    )
    memory = [
        (f"rank {rank.rank}", sum(rank.memory.values()) / 2**20, rank.memory_peak / 2**20)
        for rank in report.ranks
        if rank.memory
    ]
    if memory:
        columns = "rank", "planned", "used at most"
        yield Plot(
            "memory",
            "Memory of each rank",
            columns,
            memory,
            draw_beside,
            "MiB",
            bars_height(2 * len(memory), 2),
        )
    yield from _distributions(directory)


def write_figures(drawn: Sequence[Plot], folder: Path) -> list[Path]:
    """Write each plot's table as CSV and, with matplotlib, its figure as SVG and PDF; the files."""
    make(folder)
    written = []
    for plot in drawn:
        path = folder / f"{plot.name}.csv"
        with replacing(path) as file:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([plot.header, *plot.rows])
            file.write(text.getvalue().encode())
        written.append(path)
        for kind in ("svg", "pdf") if available() else ():
            path = folder / f"{plot.name}.{kind}"
            with replacing(path) as file:
                plot.figure().savefig(file, format=kind)
            written.append(path)
    return written


def _throughput(timeline: Sequence[tuple[float, int, int]]) -> Plot:
    """Generated tokens per second or, where nothing is generated (scores, embeddings), requests per second."""
    if timeline[-1][1]:
        caption, unit = "Generated tokens per second", "tokens/s"
        rows = [*_rates([(now, tokens) for now, tokens, _ in timeline])]
    else:
        caption, unit = "Finished requests per second", "requests/s"
        rows = [*_rates([(now, finished) for now, _, finished in timeline])]
    return Plot("throughput", caption, ("seconds from", "to", unit), rows, draw_rates)


def _rates(counted: Sequence[tuple[float, int]]) -> Iterator[Row]:
    """Yield the beginning, the end and the rate of each stretch of time; short stretches are taken together."""
    shortest = (counted[-1][0] - counted[0][0]) / 100
    ends = [counted[0]]
    for point in counted[1:]:
        if point[0] > ends[-1][0] + shortest:
            ends.append(point)
    if len(ends) > 1:
        ends[-1] = counted[-1]
    for (since, had), (now, has) in itertools.pairwise(ends):
        yield round(since, 3), round(now, 3), round((has - had) / (now - since), 3)


def _seconds_of(report: Report, rank: RankStatistics, kind: str) -> float:
    if kind == ELSE:
        return max(0.0, round(report.computing - sum(rank.seconds.values()), 6))
    return rank.seconds.get(kind, 0.0)


def _sent(rank: RankStatistics, kind: str) -> float:
    """Bytes."""
    return rank.messages.get(kind, {}).get("bytes_sent", 0)


def _by_rank(
    name: str,
    caption: str,
    kinds: Mapping[str, str],
    report: Report,
    value: Callable[[RankStatistics, str], float],
    unit: str,
) -> Iterator[Plot]:
    """Yield a plot with a bar for each rank; `kinds` has what the page calls a kind. What no rank has is left out."""
    values = {kind: [value(rank, kind) for rank in report.ranks] for kind in kinds}
    found = [kind for kind in kinds if any(values[kind])]
    if found:
        rows = [
            (f"rank {rank.rank}", *(values[kind][i] for kind in found)) for i, rank in enumerate(report.ranks)
        ]
        columns = "rank", *(kinds[kind] for kind in found)
        height = bars_height(len(rows), len(found))
        yield Plot(name, caption, columns, rows, draw_stacked, unit, height)


def _distributions(directory: Path) -> Iterator[Plot]:
    """Lengths of prompts and answers, and seconds that answers took, where the files with them are there."""
    if not (directory / HDF5).is_file() or not (directory / TIMINGS).is_file():
        return
    with existing_file(directory / HDF5) as h5, existing_file(directory / TIMINGS) as timings:
        lengths = {
            "prompts": np.diff(h5["prompts/offsets"][:]),
            "answers": np.diff(h5["tokens/offsets"][:]),
        }
        waited, ran = timings["seconds_waiting"][:], timings["seconds_running"][:]
    # Scored texts and embeddings have answers of no tokens.
    found = {name: values[values > 0] for name, values in lengths.items() if values.any()}
    yield from _histogram("lengths", f"Lengths of {' and '.join(found)}", found, "tokens")
    took = {"waiting": waited, "from the first step to the last": ran}
    yield from _histogram("latencies", "Seconds that answers took", took, "seconds")


def _histogram(name: str, caption: str, values: Mapping[str, Any], unit: str) -> Iterator[Plot]:
    everything = np.concatenate([*values.values(), []])
    if len(everything) <= len(values):  # there is one value of each kind, which makes no plot
        return
    if unit == "tokens":  # whole numbers, which are in the middle of their bins
        least, count = int(everything.min()), int(np.ptp(everything)) + 1
        width = -(-count // BINS)
        edges = least - 0.5 + width * np.arange(-(-count // width) + 1)
    else:
        edges = np.histogram_bin_edges(everything, BINS)
    counts = [np.histogram(of, edges)[0] for of in values.values()]
    rows = [
        (round(float(edges[i]), 6), round(float(edges[i + 1]), 6), *(int(count[i]) for count in counts))
        for i in range(len(edges) - 1)
    ]
    yield Plot(name, caption, (f"{unit} from", "to", *values), rows, draw_histogram, unit)
