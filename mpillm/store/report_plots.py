"""The plots of a report's page, as SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mpillm.store.report import RankStatistics, Report

Axes = Any  # matplotlib's, which need not be installed

# What the page calls what report.json counts: seconds by what they went to, bytes by the message they were in.
_SECONDS = {
    "compute": "computing", "weights": "waiting for weights", "kv": "waiting for the KV cache on disk",
    "all_reduce": "waiting for other shards", "pipe": "waiting for other stages", "step": "waiting for a step",
    "reply": "waiting for replies",
}  # fmt: skip
_MESSAGES = {
    "all_reduce": "sums over shards", "pipe": "activations to the next stage", "step": "steps", "reply": "replies",
}  # fmt: skip


def plots(report: Report) -> Iterator[tuple[str, str]]:
    """Captions and SVG of all plots; none without matplotlib."""
    try:
        import matplotlib as mpl  # type: ignore[import-not-found, unused-ignore]
        from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return

    def plot(draw: Callable[[Axes], None]) -> str:
        figure = Figure(figsize=(8, 3), layout="constrained")
        draw(figure.add_subplot())
        out = io.StringIO()
        with mpl.rc_context({"svg.hashsalt": "mpillm", "svg.fonttype": "none"}):
            figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        text = out.getvalue()
        return text[text.index("<svg") :]

    if len(report.timeline) > 1:
        yield "Generated tokens over time", plot(lambda axes: _draw_timeline(axes, report))
    yield "Where each rank's seconds went", plot(lambda axes: _draw_seconds(axes, report))
    yield "Bytes sent by each rank", plot(lambda axes: _draw_wire(axes, report))
    yield (
        "The weight cache: uses that were served and that had to be loaded",
        plot(lambda axes: _draw_cache(axes, report)),
    )


def _draw_timeline(axes: Axes, report: Report) -> None:
    seconds, tokens, _ = zip(*report.timeline, strict=True)
    axes.plot(seconds, tokens)
    axes.set_xlabel("seconds")
    axes.set_ylabel("tokens")


def _draw_seconds(axes: Axes, report: Report) -> None:
    _draw_stacked(axes, report, _SECONDS, lambda rank, kind: rank.seconds.get(kind, 0.0))
    axes.set_xlabel("seconds")


def _draw_wire(axes: Axes, report: Report) -> None:
    _draw_stacked(
        axes, report, _MESSAGES, lambda rank, kind: rank.messages.get(kind, {}).get("bytes_sent", 0) / 2**20
    )
    axes.set_xlabel("MiB")


def _draw_cache(axes: Axes, report: Report) -> None:
    names = {"hits": "found in memory", "misses": "loaded"}
    _draw_stacked(axes, report, names, lambda rank, kind: rank.weights.get(kind, 0))
    axes.set_xlabel("uses")


def _draw_stacked(
    axes: Axes, report: Report, kinds: Mapping[str, str], value: Callable[[RankStatistics, str], float]
) -> None:
    """A bar for each rank; `kinds` has what the page calls a kind. What no rank has is left out."""
    names = [f"rank {rank.rank}" for rank in report.ranks]
    left = [0.0] * len(names)
    for kind, shown in kinds.items():
        values = [value(rank, kind) for rank in report.ranks]
        if any(values):
            axes.barh(names, values, left=left, label=shown)
            left = [start + width for start, width in zip(left, values, strict=True)]
    axes.invert_yaxis()
    if any(left):
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize="small")
