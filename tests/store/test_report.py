"""The report: what it counts, and the page that is made of it, with and without plots."""

from __future__ import annotations

import csv
import html
import re
from pathlib import Path
from typing import Any

import h5py
import pytest

from mpillm.comm.counters import MessageCounters
from mpillm.errors import JobError
from mpillm.store import report, report_page, report_plots
from mpillm.store.directory import Directory


def made(**more: Any) -> report.Report:
    ranks = [
        report.RankStatistics(
            rank=rank, host=f"node<{rank}>", stage=0, shard=rank, layers=30, threads=2, kernels="avx2",
            weights={"share": 2**30, "budget": 2**29, "peak": 2**29, "hits": 30 * rank, "misses": 7},
            kv={"budget": 2**28, "bytes": 2**27, "blocks": 5},
            messages={"all_reduce": {"messages": 4, "bytes_sent": 300 * (rank + 1)}, "pipe": {"bytes_sent": 0}},
            seconds={"compute": 1.5, "wire": 0.5},
        )
        for rank in range(2)
    ]  # fmt: skip
    return report.Report(
        model={"name": "small & <b>old</b>"}, job={"sampling": {"seed": 3}}, began="2026-01-01T00:00:00+00:00",
        seconds=4.0, phases={"load": 1.0, "compute": 2.0}, requests=report.Requests(total=9, ok=8, errors=1, resumed=4),
        tokens=report.Tokens(prompt=100, generated=50),
        batch=report.Steps(max_sequences=256, max_tokens=512, kv_blocks=5, steps=70, peak_sequences=9, streamed=0),
        stages=1, shards=2, wire={"activations": "f32"}, ranks=ranks, versions={"mpillm": "0"},
        timeline=[(0.0, 0, 0), (1.0, 20, 2), (2.0, 50, 5)], errors={"bad": "Line 2: no."}, **more,
    )  # fmt: skip


def test_the_last_lines_of_a_run() -> None:
    assert list(report_page.summary(made())) == [
        "9 requests (4 by earlier runs): 8 answered, 1 with an error.",
        "100 prompt and 50 generated tokens in 2.0 s of computing: 75.0 tokens/s, 25.0 generated tokens/s; "
        "4.0 s in all.",
        "Sent for each token: sums over shards 6 B (f32).",
    ]


def test_a_start_that_finds_all_finished_says_so() -> None:
    """No rates of nothing, and no rank that the others waited for."""
    run = made(earlier=[report.Start(seconds=2.0, tokens=report.Tokens(prompt=100, generated=50))])
    run.requests.resumed, run.tokens = 9, report.Tokens(prompt=0, generated=0)
    assert [line.partition(":")[0] for line in report_page.summary(run)] == [
        "9 requests (9 by earlier runs)",
        "Nothing was computed.",
        "With 1 earlier start of this command",
    ]


def test_one_of_a_kind_is_one(tmp_path: Path) -> None:
    run = made()
    run.requests = report.Requests(total=1, ok=1, errors=0, resumed=0)
    report.write(Directory(tmp_path), run)
    page = report_page.write_html(tmp_path)[0].read_text()
    assert "<title>Report of the run " in page
    assert "</b>, on 2 ranks of 2 hosts, from 2026-01-01 00:00:00 UTC.</p>" in html.unescape(page)
    assert "<h2>Errors</h2>" in page
    assert "<p>1 request: 1 answered" in page
    assert "<h2>Ranks: 1 stage x 2 shards</h2>" in page


def test_bars_of_many_ranks_have_no_room_beyond_them(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plots are matplotlib's, an extra")
    run = made()
    run.ranks *= 32
    for plot in report_plots.plots(run, tmp_path):
        if len(plot.rows) == 64:
            assert plot.figure().axes[0].get_ylim() == (63.5, -0.5), plot.name


def test_a_legend_names_what_can_be_seen(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plots are matplotlib's, an extra")
    run = made()
    for rank in run.ranks:
        rank.seconds = {"compute": 1.5, "reply": 1e-4, "step": 0.1}
    plot = next(plot for plot in report_plots.plots(run, tmp_path) if plot.name == "seconds")
    shown = {text.get_text() for text in plot.figure().axes[0].get_legend().get_texts()}
    assert {"computing", "waiting for a step"} <= shown
    assert "waiting for replies" in plot.columns
    assert "waiting for replies" not in shown
    assert plot.columns[-1] == "everything else"
    assert [sum(row[1:]) for row in plot.rows] == [pytest.approx(run.computing)] * 2, (
        "where all of the time went"
    )


def test_nothing_of_a_figure_is_cut_off(tmp_path: Path) -> None:
    """Legends of all kinds fit, and leave room for a single rank's bar; no bar ends where the plot does."""
    pytest.importorskip("matplotlib", reason="the plots are matplotlib's, an extra")
    run = made(replicas=2)
    del run.ranks[1:]
    run.batch.streamed = 1
    run.ranks[0].seconds = dict.fromkeys(report_plots.SECONDS, 1.0)
    run.ranks[0].messages = {kind: {"bytes_sent": 50} for kind in report_plots.MESSAGES}
    found = list(report_plots.plots(run, tmp_path))
    assert len(found) == 4
    for plot in found:
        figure = plot.figure()
        figure.draw_without_rendering()
        (axes,) = figure.axes
        legend = axes.get_legend()
        if legend is None:
            continue
        box = legend.get_window_extent()
        assert box.x0 >= 0, plot.name
        assert box.x1 <= figure.bbox.x1, plot.name
        assert box.y1 <= figure.bbox.y1, plot.name
        assert axes.get_window_extent().height > 20, plot.name
        assert max(bar.get_x() + bar.get_width() for bar in axes.patches) < axes.get_xlim()[1], plot.name


def test_a_run_in_several_starts(tmp_path: Path) -> None:
    """What each start computed, and the phases of the last one add up to its time."""
    earlier = report.Start(seconds=30.0, tokens=report.Tokens(prompt=700, generated=11, shared=600))
    report.write(Directory(tmp_path), made(earlier=[earlier]))
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", report_page.write_html(tmp_path)[0].read_text())
    starts = [
        "1",
        "30.0",
        "700",
        "600",
        "11",
        "last",
        "2.0",
        "100",
        "0",
        "50",
        "all",
        "32.0",
        "800",
        "600",
        "61",
    ]
    assert cells[:15] == starts
    times = [
        "starting the processes",
        "1.00",
        "load",
        "1.00",
        "loading and computing",
        "2.00",
        "in all",
        "4.00",
    ]
    assert cells[15:23] == times


def test_what_is_not_paged_has_no_uses(tmp_path: Path) -> None:
    run = made()
    report.write(Directory(tmp_path), run)
    assert "Uses of" not in report_page.write_html(tmp_path)[0].read_text()
    run.batch.streamed = 1
    for rank in run.ranks:
        rank.experts = {"budget": 2**20, "peak": 2**20, "hits": 9, "misses": 3, "stalls": 2, "loaded": 5}
    report.write(Directory(tmp_path), run)
    page = report_page.write_html(tmp_path)[0].read_text()
    assert page.index("<h2>Uses of paged weights</h2>") < page.index("<h2>Uses of experts</h2>")


def test_nothing_is_said_of_nothing() -> None:
    """Scores have no generated tokens, and messages of next to no bytes are none."""
    run = made()
    run.tokens = report.Tokens(prompt=5000, generated=0)
    assert list(report_page.summary(run))[1:] == [
        "5000 prompt tokens in 2.0 s of computing: 2500.0 tokens/s; 4.0 s in all."
    ]


def test_a_plot_says_what_there_is_to_see(tmp_path: Path) -> None:
    """Requests where nothing is generated, sizes in their own unit, and no other replicas where there are none."""
    pytest.importorskip("matplotlib", reason="the plots are matplotlib's, an extra")
    run = made()
    run.timeline = [(now, 0, finished) for now, _, finished in run.timeline]
    for rank in run.ranks:
        rank.messages["all_reduce"]["bytes_sent"] = 3 * 2**10
        rank.seconds["requests"] = 1.0
    found = {plot.name: plot for plot in report_plots.plots(run, tmp_path)}
    assert found["throughput"].caption == "Finished requests per second"
    assert [rate for *_, rate in found["throughput"].rows] == [2.0, 3.0]
    assert "waiting for other replicas" not in found["seconds"].columns
    run.timeline.append((2.001, 0, 5))  # what comes just before the end is no rate of its own
    assert next(report_plots.plots(run, tmp_path)).rows == [(0.0, 1.0, 2.0), (1.0, 2.001, 2.997)]
    run.timeline = [(0.0, 0, 0), (2.0, 0, 5), (2.001, 0, 5)]
    assert "throughput" not in {plot.name for plot in report_plots.plots(run, tmp_path)}
    (axes,) = found["bytes"].figure().axes
    assert (axes.get_xlabel(), axes.patches[0].get_width()) == ("KiB", 3.0)
    run.replicas = 2
    found = {plot.name: plot for plot in report_plots.plots(run, tmp_path)}
    assert "waiting for other replicas" in found["seconds"].columns


def test_what_drafts_gave() -> None:
    run = made()
    run.batch.turns, run.batch.drafted, run.batch.accepted = 20, 60, 30
    said = "Speculation: 30 of 60 drafted tokens accepted (50 %); 2.50 tokens per sequence and pass."
    assert list(report_page.summary(run))[2:3] == [said]
    run.batch.drafters = {"answers": (20, 5), "prompt lookup": (40, 25)}
    assert list(report_page.summary(run))[2:4] == [
        said,
        "Accepted by source of the drafts: earlier answers 5 of 20, prompt lookup 25 of 40.",
    ]
    run.batch.drafted, run.batch.accepted = 1, 0
    assert "Speculation: 0 of 1 drafted token accepted (0 %)" in "".join(report_page.summary(run))
    run.job |= {"draft": {"model": "small.gguf"}, "batch": {"speculation": "auto"}}
    assert "The draft model small.gguf drafted nothing, as" in "".join(report_page.summary(run))
    run.batch.drafters["model"] = (1, 0)
    assert "drafted nothing" not in "".join(report_page.summary(run))


def test_planned_beside_measured_and_the_slowest_rank() -> None:
    planned = report.Planned(seconds=9.0, of_computed=1.5, limit="computing", bubble=0.25)
    run = made(planned=planned)
    assert list(report_page.summary(run))[2] == (
        "Computing took 2.0 s; 1.5 s were planned for these tokens. Expected limit of a step: computing."
    )
    run.stages, run.ranks[1].seconds["weights"] = 2, 3.0
    assert list(report_page.summary(run))[3:5] == [
        "Stages were idle 0 % of the computing time (planned: 25 %).",
        "The slowest rank was rank 1 on node<1>: it was waiting for weights while others waited for it.",
    ]


def test_bubbles_are_what_stages_did_not_work() -> None:
    """Ranks that compute and sum 1.0 and 1.6 of 2.0 seconds have nothing to do 35 % of the time."""
    run = made()
    assert run.bubbles() is None
    run.stages = 2
    for rank, compute in zip(run.ranks, (0.9, 1.5), strict=True):
        rank.seconds = {"compute": compute, "all_reduce": 0.1, "pipe": 0.3, "step": 0.1}
    assert run.bubbles() == pytest.approx(0.35)
    assert "Stages were idle 35 % of the computing time." in list(report_page.summary(run))


def test_shared_tokens_are_said_and_are_no_work() -> None:
    shared = made()
    shared.tokens = report.Tokens(prompt=100, generated=50, shared=90)
    assert list(report_page.summary(shared))[1:] == [
        "100 prompt (90 shared) and 50 generated tokens in 2.0 s of computing: 30.0 tokens/s, "
        "25.0 generated tokens/s; 4.0 s in all.",
        "Sent for each token: sums over shards 15 B (f32).",
    ]


def test_tokens_that_are_computed_again_are_said_and_divide_bytes() -> None:
    """A run that continues unfinished answers computes their prompts again: bytes of a token were too many."""
    run = made()
    before = run.wire_bytes_per_token()
    run.tokens.recomputed = run.tokens.computed
    assert run.wire_bytes_per_token() == {kind: count / 2 for kind, count in before.items()}
    said = list(report_page.summary(run))
    assert any(line.startswith(f"{run.tokens.computed} tokens were computed again") for line in said)
    cause = "another replica went on with them"
    assert not any(cause in line for line in said)
    run.replicas = 2
    assert any(cause in line for line in report_page.summary(run))


def test_what_streaming_costs_a_token() -> None:
    streamed = made()
    streamed.batch.streamed = 500
    for rank in streamed.ranks:
        rank.weights["loaded"] = 75 * 2**20
        rank.seconds["weights"] = 1.0 / (1 + rank.rank)
    assert list(report_page.summary(streamed))[2] == (
        "70 steps of up to 9 sequences; weights read per token: 1.0 MiB; ranks waited for weights 50 % of "
        "the time."
    )


@pytest.mark.parametrize(
    ("hosts", "more"), [("ab", ""), ("aa", "; 5.0 MiB on all ranks of a host (9.0 MiB planned)")]
)
def test_the_memory_of_ranks_that_share_a_host_is_added_up(hosts: str, more: str) -> None:
    run = made()
    for rank, host in zip(run.ranks, hosts, strict=True):
        rank.host, rank.memory_peak = host, (3 - rank.rank) * 2**20
        rank.memory = {"weights": 4 * 2**20, "kv": rank.rank * 2**20}
    expected = f"Memory: at most 3.0 MiB on a rank (4.0 MiB planned){more}."
    assert list(report_page.summary(run))[2] == expected


def test_it_is_read_back(tmp_path: Path) -> None:
    report.write(Directory(tmp_path), made())
    assert report.read(tmp_path) == made()


def test_the_page_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_page, "available", lambda: False)  # matplotlib is an extra
    run = made(warnings=["The journal was damaged."])
    run.batch.streamed = 1
    report.write(Directory(tmp_path), run)
    path, missing = report_page.write_html(tmp_path)
    assert missing == "The page has no plots: they need matplotlib (pip install 'mpillm[plots]')."
    page = path.read_text()
    escaped = ("node&lt;0&gt;", "&lt;b&gt;old")
    for words in ("8 answered", *escaped, "Line 2: no.", "The journal was damaged.", "512.0 MiB", "no plots"):
        assert words in page, words
    assert not re.search(r"https?://|<script|src=", page)


def test_plots_are_inline(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plots are matplotlib's, an extra")
    run = made()
    run.batch.streamed = 1
    report.write(Directory(tmp_path), run)
    path, missing = report_page.write_html(tmp_path)
    first = path.read_bytes()
    assert missing is None
    assert first.count(b"<svg") == 4
    assert not re.search(rb"<script|src=|href=.http", first)
    report_page.write_html(tmp_path)
    assert path.read_bytes() == first


def test_each_plot_is_a_table(tmp_path: Path) -> None:
    """With `figures`: as CSV and, with matplotlib, as SVG and PDF; what no rank has is in none of them."""
    run = made()
    run.batch.streamed = 1
    report.write(Directory(tmp_path), run)
    report_page.write_html(tmp_path, tmp_path / "figures")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"throughput.csv", "seconds.csv", "bytes.csv", "weights.csv"} <= names
    assert not {"memory.csv", "experts.csv", "lengths.csv"} & names
    if report_plots.available():
        assert {"seconds.svg", "seconds.pdf"} <= names
    with (tmp_path / "figures/bytes.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["rank", "sums over shards (bytes)"],
        ["rank 0", "300.0"],
        ["rank 1", "600.0"],
    ]
    with (tmp_path / "figures/throughput.csv").open() as file:
        assert list(csv.reader(file)) == [
            ["seconds from", "to", "tokens/s"],
            ["0.0", "1.0", "20.0"],
            ["1.0", "2.0", "30.0"],
        ]


def test_lengths_and_latencies_are_those_of_the_results(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "results.h5", "w") as h5:
        h5["prompts/offsets"] = [0, 3, 10]
        h5["tokens/offsets"] = [0, 5, 5, 25]
    with h5py.File(tmp_path / "timings.h5", "w") as h5:
        h5["seconds_waiting"] = [0.0, 0.0, 1.0]
        h5["seconds_running"] = [1.0, 2.0, 3.0]
    found = {plot.name: plot for plot in report_plots.plots(made(), tmp_path)}
    assert found["lengths"].caption == "Lengths of prompts and answers"
    for name, counts, least in (("lengths", [2, 2], 2.5), ("latencies", [3, 3], 0.0)):
        rows = found[name].rows
        assert [sum(column) for column in list(zip(*rows, strict=True))[2:]] == counts
        assert rows[0][0] == least
    assert found["lengths"].rows[-1][1] == 20.5
    with h5py.File(tmp_path / "results.h5", "r+") as h5:
        h5["prompts/offsets"][:], h5["tokens/offsets"][:] = [0, 3, 3], [0, 5, 5, 5]
    assert "lengths" not in {plot.name for plot in report_plots.plots(made(), tmp_path)}  # one of each
    with h5py.File(tmp_path / "results.h5", "r+") as h5:
        h5["prompts/offsets"][:], h5["tokens/offsets"][:] = [0, 3, 10], 0
    found = {plot.name: plot for plot in report_plots.plots(made(), tmp_path)}
    assert found["lengths"].caption == "Lengths of prompts"
    with h5py.File(tmp_path / "results.h5", "r+") as h5:
        h5["prompts/offsets"][:], h5["tokens/offsets"][:] = [0, 4, 8], [0, 4, 4, 8]
    lengths = next(plot for plot in report_plots.plots(made(), tmp_path) if plot.name == "lengths")
    assert lengths.rows == [(3.5, 4.5, 2, 2)]
    if report_plots.available():
        axes = lengths.figure().axes[0]
        least, most = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if least <= tick <= most] == [4]


def test_the_line_to_cite() -> None:
    run = made()
    run.model["fingerprint"], run.model["weights"] = "abc", "Q4_0"
    assert report_page.cite(run) == (
        "mpillm 0; model small & <b>old</b> (Q4_0, fingerprint abc); 1 stage x 2 shards; sampling.seed 3; "
        "wire.activations f32"
    )


def test_the_plots_know_all_that_is_counted() -> None:
    messages = set(MessageCounters().as_dict())
    assert set(report_plots.MESSAGES) == messages
    assert set(report_plots.SECONDS) == {"compute", "weights", "kv", *messages}


def test_a_directory_without_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"^There is no finished run in \S+: it has no report\.json\.$"):
        report_page.write_html(tmp_path)
    (tmp_path / "journal").touch()
    with pytest.raises(JobError, match=r"no report\.json; mpillm status \S+ shows how far it is\.$"):
        report_page.write_html(tmp_path)
    (tmp_path / "report.json").write_text('{"model": 3}')
    with pytest.raises(JobError, match=r"report\.json is not one of this mpillm: "):
        report.read(tmp_path)
    (tmp_path / "report.json").write_bytes(b"\xff{")
    with pytest.raises(JobError, match="is not one of this mpillm"):
        report.read(tmp_path)
    (tmp_path / "report.json").unlink()
    (tmp_path / "report.json").mkdir()
    with pytest.raises(JobError, match="cannot be read: Is a directory"):
        report.read(tmp_path)
