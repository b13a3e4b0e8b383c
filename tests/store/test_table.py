"""Tables: the input's rows with their answers, in three formats, also of a run that was killed."""

from __future__ import annotations

import base64
import csv
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from mpillm import read_results
from mpillm.batch.answers import bad_line, error_line, result_line
from mpillm.cli import main
from mpillm.errors import JobError
from mpillm.store import table
from mpillm.store.directory import Directory
from tests.conftest import clean_environment, run_bounded
from tests.e2e.jobs import CHAT
from tests.e2e.test_resume import wait_for_results
from tests.job_helpers import WITH_TEXT, checked, completion

FORMATS = ("csv", "parquet", "jsonl")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows; of CSV as texts."""
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
        return rows
    return [json.loads(line) for line in path.read_text().splitlines()]


def made(folder: Path, lines: list[Any], *overrides: str, formats: tuple[str, ...] = FORMATS) -> list[Any]:
    """The tables of made-up answers to these lines."""
    batch = checked(folder, lines, *overrides)
    works = {work.custom_id: work for work in batch.works()}
    (folder / "out").mkdir(exist_ok=True)
    with (folder / "out/results.jsonl").open("wb") as file:
        for line in batch.lines:
            if line.error is not None:
                answer = bad_line(line)
            elif line.custom_id == "failed":
                answer = error_line("failed", "It is not finite.", 500)
            else:
                work = works[line.custom_id]
                done = [completion(one, [] if one.only_reads else [70, 71]) for one in work.requests]
                answer = result_line(work, done, WITH_TEXT)
            file.write(answer + b"\n")
    with Directory(folder / "out") as directory:
        for format in formats:
            table.write(directory, batch.path, batch.digest, format)  # type: ignore[arg-type]
    return [read(folder / f"out/table.{format}") for format in formats]


def test_rows_keep_their_columns_and_get_their_answers(tmp_path: Path) -> None:
    rows = [
        {"text": 'a "quoted",\nfox', "n": 1, "x": 1, "ok": True, "tags": ["a"], "big": 2**70},
        {"text": "\u4f60\u597d\r\0", "n": None, "x": 0.5, "ok": False, "custom_id": "failed"},
        {"n": 3, "ok": None},  # has no text
        b"{not json",
        {"text": "last", "n": 2**62, "only here": "\u2603"},
    ]
    of_csv, of_parquet, of_jsonl = made(tmp_path, rows, 'request={prompt="{text}", max_tokens=2}')
    names = [
        *["text", "n", "x", "ok", "tags", "big", "custom_id"],
        "only here",
        "status",
        "error",
    ]
    names += ["answer_text", "finish_reason"]
    for found in (of_csv, of_parquet, of_jsonl):
        assert [list(row) for row in found] == [names] * 5
    for row, given in zip(of_jsonl, rows, strict=True):
        if isinstance(given, dict):
            assert {name: row[name] for name in given} == given
    assert [row["custom_id"] for row in of_jsonl] == [
        f"request-{n}" if n != 2 else "failed" for n in range(1, 6)
    ]
    assert [row["status"] for row in of_jsonl] == [200, 500, 400, 400, 200]
    assert [row["error"] is None for row in of_jsonl] == [True, False, False, False, True]
    assert "Line 3: the row has no column 'text'" in of_jsonl[2]["error"]
    assert of_jsonl[0]["answer_text"] == of_jsonl[4]["answer_text"] is not None
    # Parquet has the same values, those of mixed kinds as JSON; CSV has texts.
    texts = ("tags", "big")
    for plain, typed, text in zip(of_jsonl, of_parquet, of_csv, strict=True):
        for name, value in plain.items():
            as_json = (
                value
                if isinstance(value, str)
                else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
            )
            assert typed[name] == (as_json if name in texts and value is not None else value), name
            assert text[name] == ("" if value is None else as_json), name
    schema = pyarrow.parquet.read_schema(tmp_path / "out/table.parquet")
    types = {name: str(schema.field(name).type) for name in names}
    assert [types[name] for name in ("n", "x", "ok", "status", "text")] == [
        "int64",
        "double",
        "bool",
        "int64",
        "string",
    ]


def test_answers_of_each_kind(tmp_path: Path) -> None:
    lines = [
        {"custom_id": "vector", "input": "a fox"},
        {
            "custom_id": "base64",
            "url": "/v1/embeddings",
            "body": {"input": ["a fox"], "encoding_format": "base64"},
        },
        {"custom_id": "scored", "prompt": "a fox runs", "echo": True, "max_tokens": 0, "logprobs": 0},
        {"custom_id": "chosen", "prompt": "a fox", "choices": ["is", " runs"]},
        {"custom_id": "chat", "messages": [{"role": "user", "content": "hello"}]},
        {
            "custom_id": "pairs",
            "url": "/v1/rerank",
            "body": {"query": "fox", "documents": ["a", "b", "c"], "top_n": 2},
        },
    ]
    of_csv, of_parquet, of_jsonl = made(tmp_path, lines)
    answers = [line["response"]["body"] for line in read(tmp_path / "out/results.jsonl")]
    assert [row["custom_id"] for row in of_parquet] == [line["custom_id"] for line in lines]
    assert "answer_custom_id" not in of_parquet[0]
    np.testing.assert_array_equal(
        np.float32(of_parquet[1]["embedding"]),
        np.frombuffer(base64.b64decode(answers[1]["data"][0]["embedding"]), "<f4"),
    )
    assert of_jsonl[0]["embedding"] == answers[0]["data"][0]["embedding"]
    scored = answers[2]["choices"][0]["logprobs"]["token_logprobs"][1:]
    assert of_parquet[2]["logprob"] == pytest.approx(sum(scored))
    best = answers[3]["choices"][answers[3]["best"]["logprob"]]
    assert (of_csv[3]["text"], float(of_csv[3]["logprob"])) == (answers[3]["answer"], best["logprob"])
    assert of_csv[4]["text"] == answers[4]["choices"][0]["message"]["content"]
    scores = of_parquet[5]["scores"]
    assert sum(score is None for score in scores) <= 1
    for item in answers[5]["results"]:
        assert scores[item["index"]] == item["relevance_score"]


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    lines = [{"prompt": f"fox {number}", "max_tokens": 2} for number in range(3)]
    made(tmp_path, lines)
    batch = checked(tmp_path, lines)
    before = (tmp_path / "out/table.csv").read_bytes()
    for change in ([*lines, lines[0]], lines[:2], [*lines[:2], {"prompt": "dog", "max_tokens": 2}]):
        changed = checked(tmp_path, change).path
        with (
            Directory(tmp_path / "out") as directory,
            pytest.raises(JobError, match="has changed since the run"),
        ):
            table.write(directory, changed, batch.digest, "csv")
    assert (tmp_path / "out/table.csv").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["results.jsonl", *(f"table.{format}" for format in FORMATS)]
    )


@pytest.mark.slow
def test_a_killed_run_of_a_table_goes_on_and_is_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`output.format` at the end of a run, and `export` afterwards, make the same table, whatever happened before."""
    with (tmp_path / "in.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        writer.writerows([number, f"the fox,\n{number}"] for number in range(150))
        writer.writerow(["too", "many", "fields"])
    words = ["-m", "mpillm", "run", "--model", CHAT, "--input", "in.csv", "--set", "memory.kv=16MiB"]
    words += ["--set", 'request={prompt="Label: {text}", max_tokens=8, custom_id="{id}"}']
    words += ["--set", "output.format=parquet", "--output"]
    program, env = [sys.executable, *map(str, words)], clean_environment()
    whole = run_bounded([*program, "whole"], env=env, cwd=tmp_path)
    assert whole.returncode == 1, whole.stderr
    with subprocess.Popen(
        [*program, "killed", "--set", "batch.max_num_seqs=2"],  # so that there is time to kill it
        env=env,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as run:
        wait_for_results(tmp_path / "killed/journal", run, 2000)
        run.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed/table.parquet").exists()
    again = run_bounded([*program, "killed"], env=env, cwd=tmp_path)
    assert again.returncode == 1, again.stderr
    made = (tmp_path / "killed/table.parquet").read_bytes()
    assert made == (tmp_path / "whole/table.parquet").read_bytes()
    rows = read(tmp_path / "killed/table.parquet")
    assert [row["id"] for row in rows] == [*map(str, range(150)), None]
    assert [row["error"] is None for row in rows] == [True] * 150 + [False]
    answers = read_results(tmp_path / "killed")
    assert [row["answer_text"] for row in rows] == [row["text"] for row in answers.rows()]

    assert main(["export", str(tmp_path / "killed"), "-o", str(tmp_path / "other.parquet")]) == 0
    assert (tmp_path / "other.parquet").read_bytes() == made
    assert main(["export", str(tmp_path / "killed")]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "other.parquet"),
        str(tmp_path / "killed/table.csv"),
    ]
    assert [row["id"] for row in read(tmp_path / "killed/table.csv")] == [*map(str, range(150)), ""]
    assert main(["export", str(tmp_path)]) == 2
    assert "itself, but in directories inside it: give one of them" in capsys.readouterr().err


def test_frames_have_the_rows(tmp_path: Path) -> None:
    """Of pandas and of polars, whatever kinds of answers lie side by side; without any row, too."""
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    lines = [
        {"custom_id": "text", "prompt": "a fox", "max_tokens": 2},
        {"custom_id": "vector", "input": "a fox"},
        {"custom_id": "ids", "prompt": [5, 6], "choices": [[7], [8, 9]]},
        {"custom_id": "chosen", "prompt": "a fox", "choices": ["is", " runs"]},
        {"custom_id": "scored", "prompt": "a fox runs", "echo": True, "max_tokens": 0, "logprobs": 0},
        {
            "custom_id": "ranked",
            "url": "/v1/rerank",
            "body": {"query": "fox", "documents": ["a", "b"], "top_n": 1},
        },
        {"custom_id": "chat", "messages": [{"role": "user", "content": call}]},
        b"{bad",
        {"custom_id": "failed", "prompt": "a"},
    ]
    made(tmp_path, lines, formats=())
    (tmp_path / "out/results.h5").touch()
    results = read_results(tmp_path / "out")
    rows = list(results.rows())
    rows[2]["text"] = json.dumps(rows[2]["text"], separators=(",", ":"))
    assert results.frame("polars").to_dicts() == rows
    of_pandas = results.frame("pandas")
    assert list(of_pandas.columns) == list(rows[0])
    for name in rows[0]:
        missing = [row[name] is None for row in rows]
        assert of_pandas[name].isna().tolist() == missing
        assert of_pandas[name].dropna().tolist() == [row[name] for row in rows if row[name] is not None]
