"""`mpillm merge`: parts of an input, merged, are what the whole input gives."""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mpillm.errors import JobError
from mpillm.store import report, report_page
from mpillm.store.merge import merge
from tests.conftest import clean_environment, run_bounded
from tests.job_helpers import CHAT

LINES: list[Any] = [
    {"prompt": ["the fox", [7, 8, 9]], "n": 2, "logprobs": 2, "custom_id": "\N{SNOWMAN} text"},
    {"messages": [{"role": "user", "content": "the fox"}], "custom_id": "chat"},
    {"prompt": "a", "stream": "yes", "custom_id": "refused"},
    {"prompt": "the end", "custom_id": '"quoted"'},
    {"input": ["a", [5, 6]], "custom_id": "vectors"},
    {"prompt": "a b c", "echo": True, "max_tokens": 0, "logprobs": 0, "custom_id": "scored\0"},
]
CUTS = {"000": slice(0, 2), "001": slice(2, 3), "002": slice(3, 6)}


def run(folder: Path, name: str, lines: list[Any]) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    output = folder / "parts" / name
    words = ["--model", CHAT, "--input", path, "--output", output, "--set", "sampling.max_tokens=3"]
    done = run_bounded([sys.executable, "-m", "mpillm", "run", *words], env=clean_environment())
    assert done.returncode in (0, 1), done.stderr
    return output


def datasets(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with h5py.File(path) as h5:
        h5.visititems(
            lambda name, node: found.update({name: node[:]}) if isinstance(node, h5py.Dataset) else None
        )
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merge")
    for name, cut in CUTS.items():
        run(folder, name, LINES[cut])
    (run(folder, "whole", LINES)).rename(folder / "whole")
    run(folder, "unnamed", [{"prompt": "b"}, {"prompt": "c"}]).rename(folder / "unnamed")
    return folder


def test_parts_give_what_the_whole_gives(runs: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    words = [sys.executable, "-m", "mpillm", "merge", runs / "parts", "--output", merged]
    assert run_bounded(words, env=clean_environment()).returncode == 0
    lines, of_whole = ((path / "results.jsonl").read_bytes() for path in (merged, runs / "whole"))
    # An error names the line of the part's own input.
    assert lines.replace(b"Line 1:", b"Line 3:") == of_whole
    found, whole = datasets(merged / "results.h5"), datasets(runs / "whole/results.h5")
    assert found.pop("requests/part").tolist() == [0, 0, 1, 2, 2, 2]
    assert found.pop("requests/line").tolist() == [1, 2, 1, 1, 2, 3]
    del whole["requests/line"]
    assert found.keys() == whole.keys()
    for name, values in whole.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name, strict=True)
    assert len(datasets(merged / "timings.h5")["seconds_running"]) == len(found["choices/prompt"])
    with h5py.File(merged / "results.h5") as h5, h5py.File(runs / "whole/results.h5") as whole_h5:
        assert json.loads(h5.attrs["parts"]) == list(CUTS)
        assert h5.attrs["job"] == whole_h5.attrs["job"]
    sums, one = report.read(merged), report.read(runs / "whole")
    assert (sums.requests.total, sums.requests.ok, sums.requests.errors) == (6, 5, 1)
    assert (sums.tokens.prompt, sums.tokens.generated) == (one.tokens.prompt, one.tokens.generated)
    assert sums.errors.keys() == one.errors.keys() == {"refused"}
    assert sums.timeline[-1][1] == one.tokens.generated
    assert sums.batch.turns == one.batch.turns
    assert (sums.parts, one.parts) == (3, 1)
    for rank in sums.ranks:  # they ran apart: none waited for another, and their memory is not that of a host
        rank.seconds["compute"] = rank.rank * 100.0
    assert sums.slowest() is None
    said = "\n".join(report_page.summary(sums))
    assert "at most" in said
    assert "on all ranks of a host" not in said
    assert report_page.write_html(merged)[0].is_file()


def test_ids_that_two_parts_have_get_the_names_of_their_parts(runs: Path, tmp_path: Path) -> None:
    made = merge([runs / "parts/000", runs / "unnamed", runs / "whole"], tmp_path)
    assert made.renamed
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    ids = [line["custom_id"] for line in lines]
    assert len(set(ids)) == len({line["id"] for line in lines}) == len(lines) == 10
    assert len({line["response"]["body"].get("id", line["id"]) for line in lines}) == len(lines)
    assert ids[0] == "000/\N{SNOWMAN} text"
    assert ids[2].startswith("unnamed/")
    stored = [text.decode() for text in datasets(tmp_path / "results.h5")["requests/custom_id"]]
    assert [json.loads(text) if text.startswith('"') else text for text in stored] == ids
    assert list(report.read(tmp_path).errors) == ["whole/refused"]
    again = tmp_path / "results.jsonl"
    before = again.read_bytes()
    merge([runs / "parts/000", runs / "unnamed", runs / "whole"], tmp_path)
    assert again.read_bytes() == before


def test_what_cannot_be_merged_is_named(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/journal").write_bytes(b"")
    with pytest.raises(
        JobError, match=r"begun has no results.jsonl: that part is not finished, run its command"
    ):
        merge([runs / "whole", tmp_path / "begun"], tmp_path / "out")
    shutil.copytree(runs / "parts", tmp_path / "array")
    (tmp_path / "array/003").mkdir()
    (tmp_path / "array/003/journal.lock").touch()  # a part that was refused, or killed, while it started
    with pytest.raises(JobError, match=r"003 has no results.jsonl: that part is not finished"):
        merge([tmp_path / "array"], tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(JobError, match="contains no output directory of a run"):
        merge([tmp_path / "out"], tmp_path / "out")
    with pytest.raises(JobError, match="given twice"):
        merge([runs / "whole", runs / "parts/../whole"], tmp_path / "out")
    with pytest.raises(JobError, match="is the output of a run"):
        merge([runs / "whole", runs / "unnamed"], runs / "whole")
    for name in ("once", "again"):
        merge([runs / "parts"], tmp_path / name)
    for first, second in (("once", "again"), (runs / "unnamed", "once")):
        with pytest.raises(
            JobError, match="once was made by mpillm merge; give the parts that it was made of"
        ):
            merge([tmp_path / first, tmp_path / second], tmp_path / "out")
    other = tmp_path / "other"
    words = ["--model", str(CHAT), "--input", str(runs / "000.jsonl"), "--output", str(other)]
    words += ["--set", "sampling.max_tokens=4"]
    assert (
        run_bounded([sys.executable, "-m", "mpillm", "run", *words], env=clean_environment()).returncode == 0
    )
    with pytest.raises(JobError, match=r"are not parts of the same job: their job differs .*max_tokens"):
        merge([runs / "whole", other], tmp_path / "out")


def test_the_status_of_parts(runs: Path, tmp_path: Path) -> None:
    """Of a directory of parts, as an array makes them; a merged one and a report of parts say what to type."""
    parts = tmp_path / "parts"
    shutil.copytree(runs / "parts", parts)
    words = [sys.executable, "-m", "mpillm"]
    status = [*words, "status", parts]
    done = run_bounded(status, env=clean_environment())
    assert done.returncode == 1, "a line of a part is an error"
    assert done.stdout.startswith(
        f"{parts}: 3 runs begun, 3 complete\n  requests  6 of 6 (100 %), 1 with an error\n"
    )
    watched = run_bounded([*words, "watch", parts], env=clean_environment())
    assert (watched.returncode, watched.stdout) == (1, done.stdout)
    journal = parts / "001/journal"
    journal.write_bytes(journal.read_bytes()[:-20])  # as a killed run leaves it
    cut = run_bounded(status, env=clean_environment())
    assert cut.returncode == 75
    assert ": 3 runs begun, 2 complete\n" in cut.stdout
    assert "\n  001  stopped: 0 of 1 requests, written 0:00:" in cut.stdout
    found = json.loads(run_bounded([*status, "--json"], env=clean_environment()).stdout)
    assert [part["state"] for part in found["parts"]] == ["complete", "stopped", "complete"]
    (parts / "003").mkdir()
    (parts / "003/journal.lock").touch()  # as of a run that was refused, or killed, while it started
    early = run_bounded(status, env=clean_environment())
    assert early.returncode == 75
    assert ": 4 runs begun, 2 complete\n" in early.stdout
    assert early.stdout.endswith("\n  003  stopped before it computed anything; run its command again\n")
    with open(parts / "003/journal.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_bounded(status, env=clean_environment()).stdout.endswith("\n  003  starting\n")
    (tmp_path / "none").mkdir()
    none = run_bounded([*words, "status", tmp_path / "none"], env=clean_environment())
    assert (none.returncode, "No run has begun in" in none.stderr) == (2, True)
    shutil.rmtree(parts / "003")
    page = run_bounded([*words, "report", parts], env=clean_environment())
    assert (page.returncode, f"with mpillm merge {parts} --output DIR" in page.stderr) == (2, True)
    merge([runs / "parts"], tmp_path / "merged")
    merged = run_bounded([*words, "status", tmp_path / "merged"], env=clean_environment())
    assert (merged.returncode, f"type: mpillm report {tmp_path / 'merged'}" in merged.stderr) == (2, True)
    (tmp_path / "merged/report.json").unlink()  # as a killed merge leaves it
    killed = run_bounded([*words, "status", tmp_path / "merged"], env=clean_environment())
    assert (killed.returncode, "was made by a merge that did not end; type it again" in killed.stderr) == (
        2,
        True,
    )
