"""The plots of a report: their data as tables, and their figures by matplotlib."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mpillm.comm.counters import WAITED_FOR
from mpillm.store.directory import make, replacing
from mpillm.store.hdf5 import existing_file
from mpillm.store.report import BUSY, RankStatistics, Report
from mpillm.store.results import HDF5, TIMINGS

Axes = Any  # matplotlib's, which need not be installed
Row = tuple[Any, ...]

# What the page calls what report.json counts: seconds by what they went to, bytes by the message they were in.
SECONDS = BUSY | {kind: f"waiting for {what}" for kind, what in WAITED_FOR.items()}
MESSAGES = {
    "all_reduce": "sums over shards", "pipe": "activations to the next stage", "step": "steps", "reply": "replies",
    "requests": "requests and answers",
}  # fmt: skip
ELSE = "everything else"  # that a rank does while the run computes, such as reading lines and drawing tokens
USES = {"hits": "found in memory", "misses": "loaded"}
UNITS = ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)
BINS = 30  # bins of a histogram
VISIBLE = 5e-3  # a part that is shorter than this share of the longest bar is not visible
WIDTH = 4.8  # inches of a figure: a phone shows it with letters that can be read
LEGEND_COLUMNS, LEGEND_ROW = 2, 0.18  # inches


@dataclass(frozen=True)
class Plot:
    """A table of numbers and how it is drawn; `name` is that of its files."""

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Row]
    draw: Callable[[Axes, Plot], None]
    unit: str = ""
    height: float = 2.6  # inches

    @property
    def header(self) -> Sequence[str]:
        """The columns of its table, with the unit where no column names it."""
        if self.columns[0] != "rank":
            return self.columns
        return ["rank", *(f"{name} ({self.unit})" for name in self.columns[1:])]

    def figure(self) -> Any:
        """Return a figure of matplotlib; ImportError without it."""
        from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

        figure = Figure(figsize=(WIDTH, self.height), layout="constrained")
        self.draw(figure.add_subplot(), self)
        return figure

    def svg(self) -> str:
        """Return the figure for a page: its lines and letters have the colour of the page's text."""
        import matplotlib as mpl  # type: ignore[import-not-found, unused-ignore]

        out = io.StringIO()
        with mpl.rc_context({"svg.hashsalt": "mpillm", "svg.fonttype": "none"}):
            metadata = {"Date": None, "Creator": None}
            self.figure().savefig(out, format="svg", metadata=metadata, transparent=True)
        text = out.getvalue()
        return text[text.index("<svg") :].replace("#000000", "currentColor")


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
            _draw_beside,
            "MiB",
            _bars_height(2 * len(memory)),
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
    return Plot("throughput", caption, ("seconds from", "to", unit), rows, _draw_rates)


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
        height = _bars_height(len(rows)) + (len(found) - 1) // LEGEND_COLUMNS * LEGEND_ROW
        yield Plot(name, caption, columns, rows, _draw_stacked, unit, height)


def _bars_height(bars: int) -> float:
    """Return the height in inches of a figure with `bars` bars."""
    return min(1.0 + 0.3 * bars, 20.0)


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
    yield Plot(name, caption, (f"{unit} from", "to", *values), rows, _draw_histogram, unit)


def _draw_rates(axes: Axes, plot: Plot) -> None:
    starts, ends, rates = zip(*plot.rows, strict=True)
    axes.stairs(rates, [*starts, ends[-1]], linewidth=1.5)
    axes.set_xlabel("seconds of computing")
    axes.set_ylabel(plot.columns[2])
    axes.set_ylim(bottom=0, top=1.05 * max(*rates, 1e-9))  # else a line at the top is cut in half


def _draw_stacked(axes: Axes, plot: Plot) -> None:
    """Draw a bar for each rank. What is too narrow to be seen in any of them is not in the legend."""
    names, *values = zip(*plot.rows, strict=True)
    left = [0.0] * len(names)
    longest = max(map(sum, zip(*values, strict=True)))
    unit, size = plot.unit, 1
    if unit == "bytes":
        unit, size = next((larger for larger in UNITS if longest >= larger[1]), (unit, size))
    for label, widths in zip(plot.columns[1:], values, strict=True):
        scaled = [width / size for width in widths]
        axes.barh(names, scaled, left=left, label=label if max(widths) > VISIBLE * longest else None)
        left = [start + width for start, width in zip(left, scaled, strict=True)]
    axes.set_xlim(0, 1.05 * longest / size)  # else a bar may end where the plot does
    _finish_bars(axes, plot, unit)


def _draw_beside(axes: Axes, plot: Plot) -> None:
    """Bars beside each other for each rank."""
    names, *values = zip(*plot.rows, strict=True)
    height = 0.8 / len(values)
    for i, (label, widths) in enumerate(zip(plot.columns[1:], values, strict=True)):
        axes.barh(
            [at + (i - (len(values) - 1) / 2) * height for at in range(len(names))],
            widths,
            height,
            label=label,
        )
    axes.set_yticks(range(len(names)), names)
    _finish_bars(axes, plot, plot.unit)


def _finish_bars(axes: Axes, plot: Plot, unit: str) -> None:
    axes.set_ylim(len(plot.rows) - 0.5, -0.5)  # the first at the top, and no room beyond the bars
    axes.set_xlabel(unit)
    _legend(axes)


def _draw_histogram(axes: Axes, plot: Plot) -> None:
    starts, ends, *counts = zip(*plot.rows, strict=True)
    edges = [*starts, ends[-1]]
    for label, of in zip(plot.columns[2:], counts, strict=True):
        axes.stairs(of, edges, label=label, fill=True, alpha=0.7)
    axes.set_xlabel(plot.unit)
    axes.set_ylabel("how many")
    axes.locator_params(axis="y", integer=True)
    if plot.unit == "tokens":
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Draw a legend above the plot."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=LEGEND_COLUMNS, frameon=False, fontsize="small",
        handlelength=1.2, columnspacing=1.2,
    )  # fmt: skip
