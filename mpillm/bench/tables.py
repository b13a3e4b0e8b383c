"""The results of a bench as tables for people, and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from mpillm.bench.result import Bench, Kernel, Run
from mpillm.spec import shown_bytes
from mpillm.store import readable
from mpillm.words import count_of

SHOWN = 4  # kernels of a run that are named

# The heads of the tables.
KERNELS = ("kernel", "on", "rows", "threads", "time", "GB/s", "of memory", "GOP/s", "of int8", "over scalar")
PAGING = (
    "paging", "threads", "budget", "tokens/s", "time", "read", "GB/s", "disk GB/s", "of the limit", "waited",
    "to 1st step", "1st step", "memory",
)  # fmt: skip
SPECULATION = (
    "speculation",
    "drafts",
    "threads",
    "weights held",
    "tokens/s",
    "ratio",
    "tokens a pass",
    "right",
)
RUNS = (
    "run",
    "threads",
    "tokens/s",
    "time",
    "read a step",
    "of memory",
    "of int8",
    "sent a token",
    "outside kernels",
)


def as_json(made: Bench) -> str:
    """Return the results as JSON."""
    return readable.as_json(made).decode()


def as_text(made: Bench) -> str:
    """Return the results as tables."""
    return "\n".join(_lines(made))


def run_line(run: Run) -> str:
    """Return one run as a line, which is printed as soon as the run is over."""
    beside = "" if run.ratio is None else f", {run.ratio:.2f} x the peer"
    if run.what == "paging":
        beside = f" with {shown_bytes(run.budget)} of weights"
    if run.what == "speculation":
        beside = f" with drafts {run.drafts}, {run.per_pass:.2f} tokens a pass"
    if run.disk_share is not None:
        beside += f", {_percent(run.disk_share)} of the disk's limit"
    return f"{_what(run)}, {count_of(run.threads, 'thread')}: {_speed(run)}{beside}"


def _lines(made: Bench) -> Iterator[str]:
    machine = made.machine
    layout = f"{count_of(made.stages, 'stage')} x {count_of(made.shards, 'shard')}"
    yield f"mpillm {made.version}, {count_of(made.ranks, 'rank')} on {count_of(made.hosts, 'host')}, {layout}"
    yield f"model    {made.model} ({shown_bytes(made.model_bytes)})"
    yield f"machine  {machine.cpu}, {count_of(machine.cores, 'core')}, kernels {machine.kernels}"
    for threads, read in machine.read.items():
        int8 = machine.int8.get(threads)
        more = "" if int8 is None else f", {int8 / 1e9:.0f} GOP/s of 8-bit integers in registers"
        yield f"limits   {count_of(threads, 'thread')}: {read / 1e9:.1f} GB/s read from memory{more}"
    if made.peer:
        yield f"peer     {made.peer}"
    yield from _part(KERNELS, map(_kernel_row, made.kernels))
    yield from _part(PAGING, (_paging_row(run) for run in made.runs if run.what == "paging"))
    yield from _part(SPECULATION, (_speculation_row(run) for run in made.runs if run.what == "speculation"))
    others = [run for run in made.runs if run.what not in ("paging", "speculation")]
    peer = ["the peer's", "ratio"] if made.peer else []
    told = any(run.joules is not None for run in others)
    heads = [*RUNS, *(["J a token"] if told else []), *peer]
    yield from _part(heads, (_run_row(run, told, bool(made.peer)) for run in others))
    if others:
        yield ""
        for run in others:
            if run.kernels:
                shares = [f"{name} {100 * share:.1f} %" for name, share in list(run.kernels.items())[:SHOWN]]
                yield f"{_what(run)}, {count_of(run.threads, 'thread')}: {', '.join(shares)}"


def _part(head: Sequence[str], rows: Iterable[list[str]]) -> Iterator[str]:
    """Yield a table behind an empty line; nothing if it has no rows."""
    if listed := list(rows):
        yield ""
        yield from _table([head, *listed])


def _kernel_row(kernel: Kernel) -> list[str]:
    operations = f"{kernel.operations / 1e9:.1f}" if kernel.operations else ""
    faster = "" if kernel.over_scalar is None else f"{kernel.over_scalar:.1f} x"
    return [
        kernel.name, kernel.detail, str(kernel.rows), str(kernel.threads), _time(kernel.seconds),
        f"{kernel.rate / 1e9:.2f}", _percent(kernel.read_share), operations, _percent(kernel.int8_share), faster,
    ]  # fmt: skip


def _run_row(run: Run, told: bool, peer: bool) -> list[str]:
    rate = f"{run.rate:.1f}" if run.rate else ""
    read = shown_bytes(run.weight_bytes + run.kv_bytes) if run.weight_bytes else ""
    row = [
        _what(run),
        str(run.threads),
        rate,
        _time(run.seconds),
        read,
        _percent(run.read_share),
        _percent(run.int8_share),
    ]
    row += [shown_bytes(run.wire_bytes) if run.wire_bytes else "", _percent(run.overhead)]
    if told:
        row.append("" if run.joules is None else f"{run.joules:.3g}")
    if peer:
        theirs = _time(run.peer_seconds) if run.peer_seconds else f"{run.peer_rate or 0:.1f}"
        row += [theirs, "" if run.ratio is None else f"{run.ratio:.2f}"]
    return row


def _paging_row(run: Run) -> list[str]:
    disk = "" if run.disk is None else f"{run.disk / 1e9:.2f}"
    return [
        _what(run), str(run.threads), shown_bytes(run.budget), f"{run.rate:.2f}", _time(run.seconds),
        shown_bytes(run.streamed), f"{run.streamed / run.seconds / 1e9:.2f}", disk, _percent(run.disk_share),
        _percent(run.waited), _time(run.ready), _time(run.first_step), shown_bytes(run.memory),
    ]  # fmt: skip


def _speculation_row(run: Run) -> list[str]:
    gain = "" if run.gain is None else f"{run.gain:.2f}"
    right = [f"{name} {drafts.accepted} of {drafts.drafted}" for name, drafts in sorted(run.drafters.items())]
    return [
        _what(run), run.drafts, str(run.threads), shown_bytes(run.budget), f"{run.rate:.2f}", gain,
        f"{run.per_pass:.2f}", ", ".join(right),
    ]  # fmt: skip


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield rows with aligned columns, of which the first two are flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.ljust(w) if i < 1 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def _what(run: Run) -> str:
    if run.what == "startup":
        return "start to first token"
    if run.what == "prefill":
        return f"prefill of {run.tokens}"
    if run.what == "speculation":
        return f"{run.text} after {run.tokens}"
    return f"decode x {run.sequences} after {run.tokens}"


def _speed(run: Run) -> str:
    return f"{run.rate:.{1 if run.rate >= 10 else 2}f} tokens/s" if run.rate else _time(run.seconds)


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"
