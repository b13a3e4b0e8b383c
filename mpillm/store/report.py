"""Where the time and the bytes of a run went: report.json, and the page that `mpillm report` makes of it."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mpillm.errors import JobError
from mpillm.spec import shown_bytes
from mpillm.store.directory import Directory, replacing
from mpillm.store.readable import as_json, printable

JSON, HTML = "report.json", "report.html"
NO_PLOTS = "The page has no plots: they need matplotlib (pip install 'mpillm[plots]')."
SHOWN_ERRORS = 20

Axes = Any  # matplotlib's, which need not be installed


class Requests(msgspec.Struct, kw_only=True):
    """Lines of the input, and how they ended; `resumed` were finished by earlier runs of the same command."""

    total: int
    ok: int
    errors: int
    resumed: int = 0


class Tokens(msgspec.Struct, kw_only=True):
    """What this run has computed, without what earlier runs of the same command had."""

    prompt: int  # all tokens of the prompts
    generated: int
    shared: int = 0  # of the prompts' tokens, those that were not computed: another request began alike
    recomputed: int = 0  # computed a second time, because the KV cache was full

    @property
    def computed(self) -> int:
        """Tokens that went through the model, each once."""
        return self.prompt - self.shared + self.generated


class Steps(msgspec.Struct, kw_only=True):
    """What steps could take on, and what they did."""

    max_sequences: int
    max_tokens: int
    kv_blocks: int
    steps: int
    most_sequences: int  # in one step
    streamed: int  # bytes of weights that all ranks together load for each step


class Rank(msgspec.Struct, kw_only=True):
    """One process: its place, and its budgets and counters. Bytes and seconds."""

    rank: int
    host: str
    stage: int
    shard: int
    layers: int
    threads: int
    kernels: str
    weights: dict[
        str, float
    ]  # share (of all its layers), budget, peak, hits, misses, stalls, stall_seconds, loaded, ...
    kv: dict[
        str, float
    ]  # budget, bytes, blocks; layers_in_file, read, written, stalls, stall_seconds if it spills
    experts: dict[str, float] = {}  # as weights, of a mixture's experts, which weights has none of then
    messages: dict[str, dict[str, float]]  # per kind: messages, bytes_sent, bytes_received, seconds waited
    memory: dict[str, int] = {}  # what was planned, at most: weights, kv, activations, process
    memory_peak: int = 0  # of the process, as the system counts it
    seconds: dict[str, float] = {}  # compute, wire, weights, idle, ...


class Report(msgspec.Struct, kw_only=True):
    """A run that came to its end."""

    model: dict[str, Any]  # name, path, fingerprint, ...
    job: dict[str, Any]  # the whole spec
    began: str  # ISO 8601
    seconds: float  # of this run, from start to end
    phases: dict[str, float]  # seconds of checking the input, loading, computing, writing
    requests: Requests
    tokens: Tokens
    batch: Steps
    stages: int
    shards: int
    ranks: list[Rank]
    versions: dict[str, str]
    timeline: list[
        tuple[float, int, int]
    ] = []  # seconds, tokens generated, requests finished, since the start
    errors: dict[str, str] = {}  # custom_id: message, of the first SHOWN_ERRORS
    warnings: list[str] = []

    @property
    def computing(self) -> float:
        """The seconds that rates are counted over."""
        return self.phases.get("compute", self.seconds) or self.seconds

    def rate(self) -> float:
        """Generated tokens per second of computing."""
        return self.tokens.generated / self.computing if self.computing else 0.0

    def total_rate(self) -> float:
        """Tokens per second of computing, prompts' and generated, without those that were shared."""
        return self.tokens.computed / self.computing if self.computing else 0.0

    def weights_per_token(self) -> float:
        """Bytes of weights that all ranks have loaded, divided by all tokens that went through the model."""
        tokens = self.tokens.computed
        loaded = sum(of.get("loaded", 0) for rank in self.ranks for of in (rank.weights, rank.experts))
        return loaded / tokens if tokens else 0.0

    def waited_for_weights(self) -> float:
        """The part of the computing time in which the rank that waited most waited for weights."""
        waited = max((rank.seconds.get("weights", 0.0) for rank in self.ranks), default=0.0)
        return waited / self.computing if self.computing else 0.0

    def expert_hits(self) -> tuple[int, int]:
        """How often an expert was still in memory when it was used, and all its uses, on all ranks."""
        counts = [(rank.experts["hits"], rank.experts["misses"]) for rank in self.ranks if rank.experts]
        hits = sum(hit for hit, _ in counts)
        return int(hits), int(hits + sum(missed for _, missed in counts))

    def wire_bytes(self) -> dict[str, float]:
        """Bytes sent by all ranks, by kind of message."""
        kinds = sorted({kind for rank in self.ranks for kind in rank.messages})
        return {
            kind: sum(rank.messages.get(kind, {}).get("bytes_sent", 0) for rank in self.ranks)
            for kind in kinds
        }

    def wire_bytes_per_token(self) -> dict[str, float]:
        """The same, divided by all tokens that went through the model."""
        tokens = self.tokens.computed
        return {kind: count / tokens if tokens else 0.0 for kind, count in self.wire_bytes().items()}


def summary(report: Report) -> Iterator[str]:
    """The few lines that are said when a run ends."""
    done = report.requests
    resumed = f" ({done.resumed} of them by earlier runs)" if done.resumed else ""
    yield f"{done.total} requests{resumed}: {done.ok} answered, {done.errors} ended in an error."
    generated = f", {report.rate():.1f} of them generated" if report.tokens.generated else ""
    tokens = report.tokens
    shared = f" ({tokens.shared} of them shared)" if tokens.shared else ""
    yield (
        f"{tokens.prompt} prompt{shared} and {tokens.generated} generated tokens in {report.seconds:.1f} s: "
        f"{report.total_rate():.1f} tokens/s while computing{generated}."
    )
    if report.batch.streamed:
        yield (
            f"{report.batch.steps} steps of up to {report.batch.most_sequences} sequences; "
            f"weights read per token: {shown_bytes(report.weights_per_token())}; "
            f"{100 * report.waited_for_weights():.0f} % of the time was waited for them."
        )
    if measured := [rank for rank in report.ranks if rank.memory]:
        yield _memory_used(measured)
    hits, uses = report.expert_hits()
    if uses:
        read = sum(rank.experts["loaded"] for rank in report.ranks if rank.experts)
        yield f"Experts: {100 * hits / uses:.1f} % of their uses found them in memory; {shown_bytes(read)} were read."
    if any(rank.kv.get("layers_in_file") for rank in report.ranks):
        read, written = (sum(rank.kv.get(key, 0) for rank in report.ranks) for key in ("read", "written"))
        waited = max(rank.kv.get("stall_seconds", 0.0) for rank in report.ranks)
        yield (
            f"KV cache on disk: {shown_bytes(read)} read, {shown_bytes(written)} written, at most {waited:.1f} s "
            "waited for it."
        )
    wire = {kind: count for kind, count in report.wire_bytes_per_token().items() if count}
    if wire:
        yield (
            "Wire bytes per token: " + ", ".join(f"{kind} {count:.0f}" for kind, count in wire.items()) + "."
        )


def _memory_used(ranks: Sequence[Rank]) -> str:
    """By the rank that took most and, where hosts have several, by all ranks of such a host."""
    used, hosts = list[tuple[int, int]](), dict[str, tuple[int, int]]()
    for rank in ranks:
        peak, planned = rank.memory_peak, sum(rank.memory.values())
        used.append((peak, planned))
        peaks, plans = hosts.get(rank.host, (0, 0))
        hosts[rank.host] = peaks + peak, plans + planned
    line = "Memory: at most {} on a rank, of {} that were planned".format(*map(shown_bytes, max(used)))
    if len(hosts) < len(used):
        line += "; {} on all ranks of a host, of {}".format(*map(shown_bytes, max(hosts.values())))
    return f"{line}."


def write(directory: Directory, report: Report) -> None:
    """Write report.json."""
    with directory.replacing(JSON) as file:
        file.write(as_json(report))
        file.write(b"\n")


def read(directory: Path) -> Report:
    """The report of a finished run; JobError if there is none."""
    path = directory / JSON
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except FileNotFoundError:
        raise JobError(f"There is no finished run in {directory}: it has no {JSON}.") from None
    except OSError as error:
        raise JobError(f"The report {path} cannot be read: {error.strerror}.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise JobError(f"The report {path} is not one of this mpillm: {error}.") from None


def write_html(directory: Path) -> tuple[Path, str | None]:
    """Write report.html from report.json; return where, and a sentence if something is missing from it."""
    report = read(directory)
    plots = list(_plots(report))
    missing = None if plots else NO_PLOTS
    path = directory / HTML
    with replacing(path) as file:
        file.write(_page(directory.name, report, plots, missing).encode())
    return path, missing


_STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 1.5rem;display:block;overflow-x:auto}
td,th{border:1px solid #ccc;padding:.2rem .6rem;text-align:right}th{background:#f3f3f3}
td:first-child,th:first-child{text-align:left}figure{margin:1rem 0}svg{max-width:100%;height:auto}
pre{background:#f6f6f6;padding:.7rem;overflow-x:auto}"""


def _page(name: str, report: Report, plots: Sequence[tuple[str, str]], missing: str | None) -> str:
    title = html.escape(f"mpillm: {printable(name)}")
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
    ]
    parts.append(f"<h1>{title}</h1>")
    parts += [f"<p>{html.escape(line)}</p>" for line in summary(report)]
    parts += [f"<p><strong>{html.escape(line)}</strong></p>" for line in (*report.warnings, missing) if line]
    parts += [
        f"<figure><figcaption>{html.escape(caption)}</figcaption>{svg}</figure>" for caption, svg in plots
    ]
    parts.append("<h2>Time</h2>")
    parts.append(
        _table(("phase", "seconds"), [(key, f"{value:.2f}") for key, value in report.phases.items()])
    )
    parts.append(f"<h2>Ranks: {report.stages} stages x {report.shards} shards</h2>")
    parts.append(_rank_table(report))
    parts.append("<h2>Wire</h2>")
    rows = [
        (kind, shown_bytes(count), f"{report.wire_bytes_per_token()[kind]:.1f}")
        for kind, count in report.wire_bytes().items()
    ]
    parts.append(_table(("message", "sent by all ranks", "bytes per token"), rows))
    if report.errors:
        parts.append(f"<h2>Errors (the first {len(report.errors)} of {report.requests.errors})</h2>")
        parts.append(_table(("custom_id", "error"), report.errors.items()))
    for heading, values in (("Model", report.model), ("Job", report.job), ("Versions", report.versions)):
        shown = as_json(values).decode()
        parts.append(f"<h2>{heading}</h2><pre>{html.escape(shown)}</pre>")
    return "\n".join(parts) + "\n"


def _rank_table(report: Report) -> str:
    head = ["rank", "host", "place", "threads", "kernels", "weights: share", "budget", "held at most"]
    head += ["KV cache", "planned", "process"]
    mixture = any(rank.experts for rank in report.ranks)
    for kind in ("", "experts: ") if mixture else ("",):
        head += [kind + "hits", "misses", "stalls", "stalled s"]
    rows = []
    for rank in report.ranks:
        place = f"stage {rank.stage}, shard {rank.shard}: {rank.layers} layers"
        row = [rank.rank, rank.host, place, rank.threads, rank.kernels]
        caches = [rank.weights, rank.experts] if mixture else [rank.weights]
        row += [shown_bytes(sum(of.get(key, 0) for of in caches)) for key in ("share", "budget", "peak")]
        row += [shown_bytes(rank.kv.get("bytes", 0)), shown_bytes(sum(rank.memory.values()))]
        row.append(shown_bytes(rank.memory_peak))
        for of in caches:
            row += [f"{of.get(key, 0):.0f}" for key in ("hits", "misses", "stalls")]
            row.append(f"{of.get('stall_seconds', 0.0):.2f}")
        rows.append(row)
    return _table(head, rows)


def _table(head: Sequence[str], rows: Any) -> str:
    def row(cells: Any, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + row(head, "th") + "".join(row(cells, "td") for cells in rows) + "</table>"


def _plots(report: Report) -> Iterator[tuple[str, str]]:
    """Captions and SVG; none without matplotlib."""
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
    kinds = sorted({kind for rank in report.ranks for kind in rank.seconds})
    _draw_stacked(axes, report, kinds, lambda rank, kind: rank.seconds.get(kind, 0.0))
    axes.set_xlabel("seconds")


def _draw_wire(axes: Axes, report: Report) -> None:
    kinds = list(report.wire_bytes())
    _draw_stacked(
        axes, report, kinds, lambda rank, kind: rank.messages.get(kind, {}).get("bytes_sent", 0) / 2**20
    )
    axes.set_xlabel("MiB")


def _draw_cache(axes: Axes, report: Report) -> None:
    _draw_stacked(axes, report, ["hits", "misses"], lambda rank, kind: rank.weights.get(kind, 0))
    axes.set_xlabel("uses")


def _draw_stacked(
    axes: Axes, report: Report, kinds: Sequence[str], value: Callable[[Rank, str], float]
) -> None:
    names = [f"rank {rank.rank}" for rank in report.ranks]
    left = [0.0] * len(names)
    for kind in kinds:
        values = [value(rank, kind) for rank in report.ranks]
        axes.barh(names, values, left=left, label=kind)
        left = [start + width for start, width in zip(left, values, strict=True)]
    axes.invert_yaxis()
    if kinds:
        axes.legend(fontsize="small")
