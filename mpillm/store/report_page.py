"""A report for people: the lines at the end of a run, and the page of `mpillm report`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mpillm.spec import shown_bytes
from mpillm.store.directory import replacing
from mpillm.store.readable import as_json, printable
from mpillm.store.report import RankStatistics, Report, Start, read
from mpillm.store.report_plots import MESSAGES, available, plots, write_figures
from mpillm.words import count_of, listed, tokens_of

HTML = "report.html"
# What the page calls the phases of a run; what is before them is the start of its processes.
PHASES = {"prepare": "checking the input", "compute": "loading and computing", "write": "writing the results"}
DRAFTS = {"answers": "earlier answers", "model": "draft model"}  # what the page calls sources of drafts
NO_PLOTS = "The page has no plots: they need matplotlib (pip install 'mpillm[plots]')."


def summary(report: Report) -> Iterator[str]:
    """Yield the few lines that are said when a run ends."""
    done = report.requests
    resumed = f" ({done.resumed} by earlier runs)" if done.resumed else ""
    yield f"{count_of(done.total, 'request')}{resumed}: {done.ok} answered, {done.errors} with an error."
    tokens = report.tokens
    if tokens.computed:
        generated = f", {report.rate():.1f} generated tokens/s" if tokens.generated else ""
        shared = f" ({tokens.shared} shared)" if tokens.shared else ""
        yield (
            f"{tokens_of(tokens.prompt, tokens.generated, shared)} in {report.computing:.1f} s of computing: "
            f"{report.total_rate():.1f} tokens/s{generated}; {report.seconds:.1f} s in all."
        )
    else:
        yield "Nothing was computed."
    if report.earlier:
        everything = report.all_starts()
        computed = tokens_of(everything.tokens.prompt, everything.tokens.generated)
        yield (
            f"With {count_of(len(report.earlier), 'earlier start')} of this command: "
            f"{computed} in {everything.seconds:.1f} s of computing."
        )
    if tokens.recomputed:
        causes = ["the KV cache was full", "an earlier start had begun the answers"]
        causes[1:1] = ["another replica went on with them"] if report.replicas > 1 else []
        yield (
            f"{count_of(tokens.recomputed, 'token')} {'was' if tokens.recomputed == 1 else 'were'} computed again, "
            f"because {listed(causes, 'or')}."
        )
    if not tokens.computed:
        return
    if report.batch.streamed:
        yield (
            f"{count_of(report.batch.steps, 'step')} of up to "
            f"{count_of(report.batch.peak_sequences, 'sequence')}; weights "
            f"read per token: {shown_bytes(report.weights_per_token())}; ranks waited for weights "
            f"{100 * report.waited_for_weights():.0f} % of the time."
        )
    if drafted := report.batch.drafted:
        yield (
            f"Speculation: {report.batch.accepted} of {count_of(drafted, 'drafted token')} accepted "
            f"({100 * report.batch.accepted / drafted:.0f} %); {report.tokens_per_turn():.2f} tokens per sequence and "
            "pass."
        )
        if len(drafters := report.batch.drafters) > 1:
            parts = [
                f"{DRAFTS.get(name, name)} {accepted} of {count}"
                for name, (count, accepted) in drafters.items()
            ]
            yield f"Accepted by source of the drafts: {', '.join(parts)}."
    if (name := _draft_model(report)) and "model" not in report.batch.drafters:
        yield f"The draft model {name} drafted nothing, as that was not expected to save time."
    if planned := report.planned:
        yield (
            f"Computing took {report.computing:.1f} s; {planned.of_computed:.1f} s were planned for "
            "these tokens. Expected "
            f"limit of a step: {planned.limit}."
        )
    if (bubbles := report.bubbles()) is not None:
        to_be = f" (planned: {100 * report.planned.bubble:.0f} %)" if report.planned else ""
        yield f"Stages were idle {100 * bubbles:.0f} % of the computing time{to_be}."
    if found := report.slowest():
        rank, why = found
        yield f"The slowest rank was rank {rank.rank} on {rank.host}: it was {why} while others waited for it."
    if measured := [rank for rank in report.ranks if rank.memory]:
        yield _memory_used(measured, together=report.parts == 1)
    hits, uses = report.expert_hits()
    if uses:
        read = sum(rank.experts["loaded"] for rank in report.ranks if rank.experts)
        yield f"Experts: {100 * hits / uses:.1f} % were in memory when they were used; {shown_bytes(read)} were read."
    if any(rank.kv.get("layers_in_file") for rank in report.ranks):
        read, written = (sum(rank.kv.get(key, 0) for rank in report.ranks) for key in ("read", "written"))
        waited = max(rank.kv.get("stall_seconds", 0.0) for rank in report.ranks)
        yield (
            f"KV cache on disk: {shown_bytes(read)} read, {shown_bytes(written)} written; a rank "
            f"waited at most {waited:.1f} s for it."
        )
    formats = {"all_reduce": report.wire.get("activations"), "pipe": report.wire.get("between_stages")}
    wire = [
        f"{MESSAGES.get(kind, kind)} {shown_bytes(count)}{f' ({formats[kind]})' if formats.get(kind) else ''}"
        for kind, count in report.wire_bytes_per_token().items()
        if round(count)
    ]
    if wire:
        yield f"Sent for each token: {', '.join(wire)}."


def _draft_model(report: Report) -> str | None:
    """Return the draft model that was to draft where that saves time; None if there is none."""
    asked: str | None = report.job.get("draft", {}).get("model")
    return asked if report.job.get("batch", {}).get("speculation") == "auto" else None


def _memory_used(ranks: Sequence[RankStatistics], together: bool) -> str:
    """Return the memory of the rank that took most and, if they ran together, of all ranks of a host with several."""
    used, hosts = list[tuple[int, int]](), dict[str, tuple[int, int]]()
    for rank in ranks:
        peak, planned = rank.memory_peak, sum(rank.memory.values())
        used.append((peak, planned))
        peaks, plans = hosts.get(rank.host, (0, 0))
        hosts[rank.host] = peaks + peak, plans + planned
    line = "Memory: at most {} on a rank ({} planned)".format(*map(shown_bytes, max(used)))
    if together and len(hosts) < len(used):
        line += "; {} on all ranks of a host ({} planned)".format(*map(shown_bytes, max(hosts.values())))
    return f"{line}."


def write_html(directory: Path, figures: Path | None = None) -> tuple[Path, str | None]:
    """Write report.html from report.json; return where, and a sentence if something is missing from it.

    `figures` is a folder for the plots: each as SVG, PDF and CSV.
    """
    report = read(directory)
    found = list(plots(report, directory))
    drawn = [(plot.caption, plot.svg()) for plot in found] if available() else []
    missing = None if drawn else NO_PLOTS
    path = directory / HTML
    with replacing(path) as file:
        file.write(_page(directory.resolve().name, report, drawn, missing).encode())
    if figures is not None:
        write_figures(found, figures)
    return path, missing


def cite(report: Report) -> str:
    """Return a line that says what decided the answers, for a publication."""
    job, model = report.job, report.model
    facts = [f"mpillm {report.versions.get('mpillm', '?')}", f"model {model.get('name', '?')}"]
    if "fingerprint" in model:
        facts[-1] += f" ({model.get('weights', '')}, fingerprint {model['fingerprint']})"
    facts += [f"{count_of(report.stages, 'stage')} x {count_of(report.shards, 'shard')}"]
    for section, values in (("sampling", job.get("sampling", {})), ("wire", report.wire)):
        facts += [f"{section}.{key} {value}" for key, value in values.items() if value not in (None, [])]
    return printable("; ".join(facts))


LONG = 28  # letters of a word that is not broken: the longest key of a job has 27
NARROW = 5  # columns of a table that a phone shows whole; of a wider one each row becomes a card
# Figures are beside each other where there is room.
_STYLE = """:root{color-scheme:light dark;--line:#ccc;--shade:#f3f3f3;--text:#222;--page:#fff}
@media screen and (prefers-color-scheme:dark){:root{--line:#555;--shade:#2a2a2a;--text:#ddd;--page:#1b1b1b}}
body{font:15px/1.45 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;color:var(--text);
background:var(--page)}table{border-collapse:collapse;margin:.5rem 0 1.5rem;display:block;overflow-x:auto}
td,th{border:1px solid var(--line);padding:.2rem .6rem;text-align:right;max-width:30rem}
.long,h1{overflow-wrap:anywhere}th{background:var(--shade)}p{max-width:62rem}.text{text-align:left}
td:not(.text){white-space:nowrap}@media(max-width:30rem){td,th{padding:.2rem .25rem}}
@media screen and (max-width:40rem){.wide tr:first-child{display:none}
.wide tr{display:block;margin-bottom:.6rem;border:1px solid var(--line);padding:.3rem .5rem}
.wide td{display:flex;justify-content:space-between;gap:1rem;border:0;padding:0}
.wide td::before{content:attr(data-head)}.wide td:first-child{font-weight:bold;justify-content:start;gap:.5rem}}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1rem;align-items:start}
figure{margin:.5rem 0}svg{width:100%;max-width:36rem;height:auto}
svg text{fill:currentColor}
pre{background:var(--shade);padding:.7rem;white-space:pre-wrap;overflow-wrap:anywhere}
@media print{:root{color-scheme:light}body{margin:0;max-width:none}.plots{grid-template-columns:1fr 1fr}
h2{break-after:avoid}.json{columns:2;font-size:9px}figure,table,tr{break-inside:avoid}
table{display:table;font-size:9px}td,th{padding:.1rem .3rem}}"""


def _page(name: str, report: Report, drawn: Sequence[tuple[str, str]], missing: str | None) -> str:
    title = html.escape(f"Report of the run {printable(name)}")
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{title}</title><style>{_STYLE}</style>"
    ]
    parts += [f"<h1>{title}</h1>", f"<p>{html.escape(_what(report))}</p>"]
    parts += [f"<p>{html.escape(line)}</p>" for line in summary(report)]
    parts += [f"<p><strong>{html.escape(line)}</strong></p>" for line in (*report.warnings, missing) if line]
    if report.earlier:
        parts += [
            "<h2>Starts</h2>",
            _starts(report),
            f"<p>What follows is of the last start{' of each part' if report.parts > 1 else ''}; "
            "the plots of answers are of all starts.</p>",
        ]
    figures = [
        f"<figure><figcaption>{html.escape(caption)}</figcaption>{svg}</figure>" for caption, svg in drawn
    ]
    parts += ["<div class=plots>", *figures, "</div>", "<h2>Time</h2>", _times(report)]
    replicas = f"{report.replicas} replicas, " if report.replicas > 1 else ""
    layout = f"{count_of(report.stages, 'stage')} x {count_of(report.shards, 'shard')}"
    parts.append(f"<h2>Ranks: {replicas}{layout}</h2>")
    parts += [_rank_table(report), *_paging_tables(report)]
    rows = [
        (MESSAGES.get(kind, kind), shown_bytes(count), shown_bytes(report.wire_bytes_per_token()[kind]))
        for kind, count in report.wire_bytes().items()
        if count
    ]
    if rows:
        parts.append("<h2>Messages between ranks</h2>")
        parts.append(_table(("message", "sent by all ranks", "for each token"), rows))
    if report.errors:
        first, of = len(report.errors), report.requests.errors
        parts.append(f"<h2>Errors{f' (the first {first} of {of})' if first < of else ''}</h2>")
        parts.append(_table(("custom_id", "error"), report.errors.items()))
    parts.append(f"<h2>To cite</h2><pre>{html.escape(cite(report))}</pre>")
    for heading, values in (("Model", report.model), ("Job", report.job), ("Versions", report.versions)):
        shown = as_json(values).decode()
        parts.append(f"<h2>{heading}</h2><pre class=json>{html.escape(shown)}</pre>")
    return "\n".join(parts) + "\n"


def _what(report: Report) -> str:
    """Return the model and the input, where and when."""
    hosts = count_of(len({rank.host for rank in report.ranks}), "host")
    ranks = count_of(len(report.ranks), "rank")
    asked = f", input {report.input.path}" if report.input else ""
    asked = f", {report.parts} merged parts" if report.parts > 1 else asked
    began = report.began[:19].replace("T", " ")
    return printable(
        f"mpillm: model {report.model.get('name', '?')}{asked}, on {ranks} of {hosts}, from {began} UTC."
    )


def _starts(report: Report) -> str:
    """Return the work of each start of the command, with its seconds of computing, and the sums."""
    named = [(str(number), start) for number, start in enumerate(report.earlier, 1)]
    named.append(("last", Start(seconds=report.computing, tokens=report.tokens)))
    named.append(("all", report.all_starts()))
    rows = [
        (name, f"{one.seconds:.1f}", one.tokens.prompt, one.tokens.shared, one.tokens.generated)
        for name, one in named
    ]
    return _table(("start", "seconds", "prompt tokens", "shared", "generated"), rows)


def _times(report: Report) -> str:
    """Return the seconds of the phases, and of what came before them."""
    before = report.seconds - sum(report.phases.values())
    rows = [("starting the processes", before)] if before > 0 else []
    rows += [(PHASES.get(key, key), value) for key, value in report.phases.items()]
    rows.append(("in all", sum(value for _, value in rows)))
    return _table(("phase", "seconds"), [(name, f"{value:.2f}") for name, value in rows])


def _rank_table(report: Report) -> str:
    place = ("replica", "stage", "shard", "layers") if report.replicas > 1 else ("stage", "shard", "layers")
    head = ["rank", "host", *place, "threads", "kernels", "share of weights", "KV cache"]
    head += ["memory planned", "used at most"]
    rows = []
    for rank in report.ranks:
        row = [rank.rank, rank.host, *(getattr(rank, name) for name in place), rank.threads, rank.kernels]
        share = sum(of.get("share", 0) for of in (rank.weights, rank.experts))
        sizes = share, rank.kv.get("bytes", 0), sum(rank.memory.values()), rank.memory_peak
        rows.append([*row, *map(shown_bytes, sizes)])
    return _table(head, rows)


def _paging_tables(report: Report) -> Iterator[str]:
    """For weights and experts that are paged, how often they were found in memory."""
    head = ["rank", "budget", "held at most", "found in memory", "loaded", "waits", "seconds waited"]
    for kind, paged in (("weights", report.batch.streamed), ("experts", True)):
        caches = [(rank.rank, getattr(rank, kind)) for rank in report.ranks]
        rows = [
            [
                number,
                *(shown_bytes(of.get(key, 0)) for key in ("budget", "peak")),
                *(f"{of.get(key, 0):.0f}" for key in ("hits", "misses", "stalls")),
                f"{of.get('stall_seconds', 0.0):.2f}",
            ]
            for number, of in caches
            if of
        ]
        if paged and rows:
            yield f"<h2>Uses of {'paged weights' if kind == 'weights' else kind}</h2>"
            yield _table(head, rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table, numbers on the right and texts on the left; only words of more than LONG letters are broken.

    On a phone each row of a wide one is a card, and the names of the columns stand before the cells.
    """
    shown = [[str(value) for value in row] for row in rows]
    texts = [any(not value[:1].isdigit() for value in column) for column in zip(*shown, strict=True)]

    def row(cells: Sequence[str], tag: str) -> str:
        out = []
        for name, text, is_text in zip(head, cells, texts, strict=True):
            kinds = {"text": is_text, "long": max(map(len, text.split()), default=0) > LONG}
            named = " ".join(kind for kind, holds in kinds.items() if holds)
            before = f' data-head="{html.escape(name)}"' if wide and tag == "td" else ""
            out.append(f'<{tag} class="{named}"{before}>{html.escape(text)}</{tag}>')
        return f"<tr>{''.join(out)}</tr>"

    wide = len(head) > NARROW
    body = "".join(row(cells, "td") for cells in shown)
    return f"<table{' class=wide' if wide else ''}>{row(head, 'th')}{body}</table>"
