"""results.jsonl and results.h5: every request once, in the input's order, and the same bytes however often stopped."""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mpillm.batch.requests import CheckedInput
from mpillm.batch.work import Work
from mpillm.errors import Interrupted
from mpillm.planning.input_needs import WRITING
from mpillm.store import hdf5, results
from mpillm.store.directory import Directory
from mpillm.store.journal import Journal
from mpillm.store.output import Claim
from tests.conftest import Mount, run_bounded
from tests.job_helpers import WITH_TEXT, checked, completion

METADATA = {"model": "small", "wire.activations": "f32", "sampling": {"seed": 3}, "seed": 3}


def inputs(draw: random.Random) -> list[Any]:
    """Good and bad lines of all kinds, the last one of each kind asked for first."""
    ids = [draw.randrange(100) for _ in range(6)]
    return [
        {"prompt": ["the fox", ids], "n": 2, "logprobs": 2, "custom_id": "\N{SNOWMAN} text"},
        b"not json",
        {"messages": [{"role": "user", "content": "the fox"}], "custom_id": "chat"},
        {"input": ["a", ids], "custom_id": "vectors"},
        {"prompt": ids, "echo": True, "max_tokens": 0, "logprobs": 0, "custom_id": "scored"},
        {"prompt": "a", "stream": True, "custom_id": "refused"},
        {"prompt": "the end", "custom_id": "fails"},
        *({"prompt": f"{n}", "custom_id": f"more {n}"} for n in range(draw.randrange(5))),
    ]


def finish(work: Work, journal: Journal) -> None:
    if work.custom_id == "fails":
        journal.append(results.failed_record(work, "It cannot be done."))
        return
    made = []
    for request in work.requests:
        draw = random.Random(f"{request.id}{request.choice}")
        tokens = [draw.randrange(6, 60) for _ in range(min(request.max_tokens, 4))]
        made.append(completion(request, tokens, draw.randrange(99), seconds_running=random.random()))
    journal.append(results.finished_record(work, made, WITH_TEXT))


def run(batch: CheckedInput, out: Path, order: random.Random, stops: int, errors: int = 3) -> None:
    """A run that is stopped so many times, and finishes its requests in another order each time."""
    for _ in range(stops + 1):
        with Claim(out) as claim, Journal(claim, {}, batch.lines) as journal:
            left = list(batch.works(journal.done))
            order.shuffle(left)
            for work in left[: len(left) // 2] if _ < stops else left:
                finish(work, journal)
                journal.flush()
    with Claim(out) as claim, Journal(claim, {}, batch.lines) as journal:
        assert results.write_jsonl(claim.directory, batch.lines, journal) == errors
        results.write_hdf5(claim.directory, batch.lines, journal, METADATA)


@pytest.mark.parametrize("seed", range(3))
def test_a_stopped_run_ends_in_the_same_files(tmp_path: Path, seed: int) -> None:
    batch = checked(tmp_path, inputs(random.Random(seed)))
    run(batch, tmp_path / "straight", random.Random(seed), stops=0)
    run(batch, tmp_path / "stopped", random.Random(seed + 1), stops=2)
    for name in ("results.jsonl", "results.h5"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == [
        "journal", "journal.lock", "results.h5", "results.jsonl", "timings.h5",
    ]  # fmt: skip


def test_every_request_once_and_in_order(tmp_path: Path) -> None:
    batch = checked(tmp_path, inputs(random.Random(4)))
    run(batch, tmp_path / "out", random.Random(4), stops=1)
    raw = (tmp_path / "out/results.jsonl").read_bytes()
    assert raw.endswith(b"\n")
    found = [json.loads(line) for line in raw.splitlines()]
    assert [line["custom_id"] for line in found] == [line.custom_id for line in batch.lines]
    status = {line["custom_id"]: line["response"]["status_code"] for line in found}
    assert [name for name, code in status.items() if code != 200] == ["request-2", "refused", "fails"]
    failed = next(line for line in found if line["custom_id"] == "fails")
    assert failed["error"]["message"] == "It cannot be done."


def test_the_numbers(tmp_path: Path) -> None:
    batch = checked(tmp_path, inputs(random.Random(2)))
    out = tmp_path / "out"
    run(batch, out, random.Random(0), stops=0)
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    with h5py.File(out / "results.h5") as h5:
        assert h5.attrs["model"] == "small"
        assert json.loads(h5.attrs["sampling"]) == {"seed": 3}
        assert h5.attrs["mpillm_version"]
        assert [name.decode() for name in h5["requests/custom_id"]] == [line["custom_id"] for line in lines]
        assert h5["requests/line"][:].tolist() == list(range(1, len(lines) + 1))
        first = h5["requests/choices"][:]
        assert np.diff(first)[:7].tolist() == [4, 0, 1, 2, 1, 0, 0]
        assert len(h5["timings/seconds_running"]) == first[-1] == len(h5["choices/finish_reason"])
        prompts, which = rows(h5["prompts"], "ids"), h5["choices/prompt"][:]
        works = {work.custom_id: work for work in batch.works()}
        for line, begin, end in zip(lines, first[:-1], first[1:], strict=True):
            for choice in range(begin, end):
                request = works[line["custom_id"]].requests[choice - begin]
                assert prompts[which[choice]].tolist() == list(request.prompt)
        text = lines[0]["response"]["body"]["choices"]
        for choice, logprobs in zip(text, rows(h5["logprobs"], "values"), strict=False):
            assert np.allclose(choice["logprobs"]["token_logprobs"], logprobs, rtol=1e-6)
        scored = lines[4]["response"]["body"]["choices"][0]["logprobs"]["token_logprobs"]
        assert np.allclose(scored[1:], rows(h5["prompt_logprobs"], "values")[first[4]], rtol=1e-6)
        assert len(rows(h5["embeddings"], "values")[first[3]]) == 8
        assert {len(row) for row in rows(h5["tokens"], "ids")} == {0, 4}


def rows(group: h5py.Group, values: str) -> list[np.ndarray[Any, Any]]:
    return np.split(group[values][:], group["offsets"][1:-1])


def test_a_full_disk_at_the_end(mounted: Mount, tmp_path: Path) -> None:
    disk = mounted("size=2m")
    batch = checked(tmp_path, [{"prompt": f"{n}", "custom_id": f"r{n}", "logprobs": 0} for n in range(60)])
    with Claim(disk / "out") as claim, Journal(claim, {}, batch.lines) as journal:
        for work in batch.works():
            finish(work, journal)
        journal.flush()
        free = 2 * 2**20 - sum(path.stat().st_blocks * 512 for path in (disk / "out").iterdir())
        filler = disk / "filler"
        filler.write_bytes(bytes(free - 8192))
        with pytest.raises(Interrupted, match=r"no space left for .*results\.jsonl"):
            results.write_jsonl(claim.directory, batch.lines, journal)
        filler.unlink()
        results.write_jsonl(claim.directory, batch.lines, journal)
        results.write_hdf5(claim.directory, batch.lines, journal, METADATA)
        with h5py.File(disk / "out/results.h5") as h5:
            assert len(h5["requests/custom_id"]) == 60
        large = (disk / "out/results.h5").stat().st_size
        for name in ("results.jsonl", "results.h5", "timings.h5"):
            (disk / "out" / name).unlink()
        # The HDF5 library meets the end in many places, and never crashes.
        for capacity in range(8192, large, 16_384):
            filler.write_bytes(bytes(free - capacity))
            with pytest.raises(Interrupted, match=r"no space left for .*\.h5"):
                results.write_hdf5(claim.directory, batch.lines, journal, METADATA)


def test_names_that_hdf5_cannot_store(tmp_path: Path) -> None:
    names = [
        "a\0b",
        "\0",
        '"quoted"',
        '"a\\u0000b"',
        "a\\u0000b",
        'in "quotes"',
        "\x1b[2J\x7f\r\n",
        "\uffff",
        "plain",
    ]
    random.shuffle(names)
    batch = checked(tmp_path, [{"prompt": "the fox", "custom_id": name} for name in names])
    run(batch, tmp_path / "out", random.Random(1), stops=1, errors=0)
    lines = (tmp_path / "out/results.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["custom_id"] for line in lines] == names
    with h5py.File(tmp_path / "out/results.h5") as h5:
        stored = [name.decode() for name in h5["requests/custom_id"]]
    assert [json.loads(name) if name.startswith('"') else name for name in stored] == names
    assert stored[names.index("plain")] == "plain"


def test_an_answer_wins_over_what_is_wrong_with_its_line_now(tmp_path: Path) -> None:
    """A run that goes on with a smaller KV cache refuses lines, but not those that are answered."""
    inputs = [{"prompt": [5] * count, "custom_id": f"{count}", "max_tokens": 4} for count in (3, 90, 4, 91)]
    large = checked(tmp_path, inputs)
    with Claim(tmp_path / "out") as claim, Journal(claim, {}, large.lines) as journal:
        for work in list(large.works())[:2]:
            finish(work, journal)
        journal.flush()
    small = checked(
        tmp_path, [*inputs, {"prompt": "a", "custom_id": "3"}], model=replace(WITH_TEXT, kv_tokens=64)
    )
    assert [line.error is None for line in small.lines] == [True, False, True, False, False]
    with Claim(tmp_path / "out") as claim, Journal(claim, {}, small.lines) as journal:
        small.keep_answered(journal.done)
        assert [line.error is None for line in small.lines] == [True, True, True, False, False]
        for work in small.works(journal.done):
            finish(work, journal)
        journal.flush()
        assert results.write_jsonl(claim.directory, small.lines, journal) == 2
        results.write_hdf5(claim.directory, small.lines, journal, METADATA)
    lines = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    with h5py.File(tmp_path / "out/results.h5") as h5:
        status = h5["requests/status"][:].tolist()
        assert np.diff(h5["requests/choices"][:]).tolist() == [1, 1, 1, 0, 0]
    assert status == [line["response"]["status_code"] for line in lines] == [200, 200, 200, 400, 400]


WRITER = """
import re, sys
from pathlib import Path
import h5py  # which the plan counts with the process, not with writing
from mpillm.batch.work import Line
from mpillm.store import results
from mpillm.store.journal import Journal
from mpillm.store.output import Claim
from mpillm.store.records import Choice, Result, line_key

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

lines = [Line(n, 0, 0, f"request {n}", b"%d" % n) for n in range(1, 30_001)]
ids = bytes(48)
with Claim(Path(sys.argv[1])) as claim, Journal(claim, {}, lines) as journal:
    for line in lines:
        choices = [Choice("stop", {"tokens": ids, "logprobs": ids}, 0.5, 0.5)]
        journal.append(Result(line.custom_id, line_key(line), 200, bytes(300), [ids], choices))
        journal.commit()
    journal.flush()
    before = peak()
    results.write_jsonl(claim.directory, lines, journal)
    results.write_hdf5(claim.directory, lines, journal, {})
    print(peak() - before)
"""


def test_writing_many_lines_takes_little_memory(tmp_path: Path) -> None:
    done = run_bounded([sys.executable, "-c", WRITER, tmp_path / "out"])
    assert done.returncode == 0, done.stderr
    # All that writing takes shows: the journal, which holds 16 bytes a line, has left no free memory behind.
    assert int(done.stdout) * 1024 < WRITING / 1.2
    with h5py.File(tmp_path / "out/results.h5") as h5:
        assert len(h5["tokens/ids"]) == 12 * 30_000
        assert h5["requests/custom_id"][-1] == b"request 30000"


def test_results_go_to_disk_in_small_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written or brought to disk in one go that could keep a signal waiting."""
    strings, arrays, syncs, unsynced = [0], [0], [0], {"bytes": 0, "most": 0}
    append, pwrite = hdf5._append, os.pwrite

    def appended(dataset: h5py.Dataset, values: np.ndarray[Any, Any]) -> None:
        of_strings = values.dtype == object
        strings.append(sum(map(len, values)) if of_strings else 0)
        arrays.append(len(values) if of_strings else values.nbytes)
        append(dataset, values)

    def written(file: int, data: Any, at: int) -> int:
        count = pwrite(file, data, at)
        unsynced["bytes"] += count
        unsynced["most"] = max(unsynced["most"], unsynced["bytes"])
        return count

    def synced(_file: int) -> None:
        syncs.append(unsynced["bytes"])
        unsynced["bytes"] = 0

    monkeypatch.setattr(hdf5, "_append", appended)
    monkeypatch.setattr(os, "pwrite", written)
    monkeypatch.setattr(os, "fdatasync", synced)
    monkeypatch.setattr(hdf5, "SYNC_BYTES", 1 << 20)
    with Directory(tmp_path) as directory, hdf5.new_file(directory, "a.h5") as (h5, check):
        names, values = hdf5.TextColumn(h5, "names"), hdf5.GrowingDataset(h5, "values", np.float64)
        for number in range(20_000):
            names.add(f"{number}".ljust(random.choice((5, 500)), "x"))
            values.add(*([0.5] * random.randrange(20)))
            check()
        names.flush()
        values.flush()
    assert max(strings) <= hdf5.HELD_CHARS + 500
    assert max(arrays) <= 8 * (hdf5.HELD + 20)
    assert len(syncs) > 4
    assert unsynced["most"] <= 3 << 20, "a part, and what the library keeps back of chunks"
