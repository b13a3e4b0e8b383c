"""Plots drawn by matplotlib: a table of numbers, and how it becomes a figure."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Axes = Any  # matplotlib's, which need not be installed
Row = tuple[Any, ...]

UNITS = ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)
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


def bars_height(bars: int, parts: int) -> float:
    """Return the height in inches of a figure with `bars` bars and a legend of `parts` names."""
    return min(1.0 + 0.3 * bars, 20.0) + (parts - 1) // LEGEND_COLUMNS * LEGEND_ROW


def draw_rates(axes: Axes, plot: Plot) -> None:
    """Draw a line of steps: the rate of each stretch of time."""
    starts, ends, rates = zip(*plot.rows, strict=True)
    axes.stairs(rates, [*starts, ends[-1]], linewidth=1.5)
    axes.set_xlabel("seconds of computing")
    axes.set_ylabel(plot.columns[2])
    axes.set_ylim(bottom=0, top=1.05 * max(*rates, 1e-9))  # else a line at the top is cut in half


def draw_stacked(axes: Axes, plot: Plot) -> None:
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


def draw_beside(axes: Axes, plot: Plot) -> None:
    """Draw bars beside each other for each rank."""
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


def draw_histogram(axes: Axes, plot: Plot) -> None:
    """Draw how many values lie in each bin, one colour for each kind of value."""
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
