"""Inputs of all forms become the same lines; what is wrong with a row is an error of that row."""

from __future__ import annotations

import datetime
import gzip
import io
import json
import random
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import polars
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from mpillm import spec
from mpillm.batch import requests
from mpillm.batch.rows import delimited, forms, json_array
from mpillm.batch.rows import parquet as batch_parquet
from mpillm.batch.rows.line import MAX_LINE, ROW_ERROR
from mpillm.batch.template import Template
from mpillm.errors import JobError, RequestError
from mpillm.store import inputs
from mpillm.store.output import INPUT, Claim
from tests.job_helpers import WITH_TEXT

TEXTS = ["plain", 'with "quotes", commas', "two\nlines", "\ttab", "élan 🦜", "{braces}", "", " spaces "]
ROWS = [{"id": str(number), "text": text} for number, text in enumerate(TEXTS * 3)]


def as_csv(data: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    quoted = [["id", "text"], *([row["id"], row["text"]] for row in data)]
    lines = (delimiter.join('"' + field.replace('"', '""') + '"' for field in row) for row in quoted)
    return "\r\n".join(lines).encode() + b"\r\n"


def as_lines(data: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in data)


def as_parquet(data: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(data), file, row_group_size=5)
    return file.getvalue()


def frames(data: bytes) -> bytes:
    """zstd in two frames, as `cat a.zst b.zst` makes them."""
    half = len(data) // 2
    return b"".join(zstandard.compress(part) for part in (data[:half], data[half:]))


FORMS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "in.jsonl": as_lines,
    "in.csv": as_csv,
    "bom.CSV": lambda data: b"\xef\xbb\xbf" + as_csv(data),
    "in.tsv": lambda data: as_csv(data, "\t"),
    "in.parquet": as_parquet,
    "compact.json": lambda data: json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode(),
    "indented.json": lambda data: json.dumps(data, indent=2).encode() + b"\n",
    "in.jsonl.gz": lambda data: gzip.compress(as_lines(data)),
    "unnamed": lambda data: gzip.compress(as_lines(data)),
    "in.jsonl.zst": lambda data: frames(as_lines(data)),
    "in.csv.gz": lambda data: gzip.compress(as_csv(data)),
    "in.json.zst": lambda data: frames(json.dumps(data).encode()),
}


def job(path: Path, *settings: str) -> spec.Spec:
    return spec.load(None, settings, input=str(path), output=str(path.parent / "out"))


def prepared(made: spec.Spec) -> list[bytes]:
    """The lines that a run of the job reads."""
    with Claim(made.output_path) as claim:
        inputs.prepare(made, claim)
    return inputs.lines_path(made).read_bytes().splitlines()


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FORMS[name](ROWS))
    made = job(path, 'request.prompt="{id}: {text}"', "request.custom_id=row {id}")
    lines = prepared(made)
    assert [json.loads(line) for line in lines] == ROWS
    assert (inputs.lines_path(made) == path) is (name == "in.jsonl")
    batch = requests.check(inputs.lines_path(made), made, WITH_TEXT)
    assert [line.error for line in batch.lines] == [None] * len(ROWS)
    assert [line.custom_id for line in batch.lines] == [f"row {row['id']}" for row in ROWS]
    found = [work.endpoint.prompt for work in batch.works()]  # type: ignore[attr-defined]
    assert found == [f"{row['id']}: {row['text']}" for row in ROWS]
    assert prepared(made) == lines  # a run that goes on sees the same


@pytest.mark.parametrize(
    "content",
    [
        'id;text;score\n1;"a; ""b"", c";4,5\n2;d,e;\n',
        '"id, sic"x;text;score\n1;"a; ""b"", c";4,5\n2;d,e;\n',
        'id\ttext\tscore\n1\ta; "b", c\t4,5\n2\td,e\t\n',
        'sep=;\nid;text;score\n1;"a; ""b"", c";4,5\n2;d,e;\n',
        'SEP=|\r\nid|text|score\r\n1|"a; ""b"", c"|4,5\r\n2|d,e|\r\n',
        'id,text,score\n1,"a; ""b"", c","4,5"\n2,"d,e",\n',
        ',id,text,score,\n0,1,"a; ""b"", c","4,5",\n1,2,"d,e",,\n',
    ],
)
def test_what_spreadsheets_write(content: str, tmp_path: Path) -> None:
    """Fields between semicolons or tabs, also where Excel says so above the header; columns without names."""
    (tmp_path / "in.csv").write_text(content, "utf-8-sig", newline="")
    first, second = (
        json.loads(line) for line in prepared(job(tmp_path / "in.csv", 'request.prompt="{text}"'))
    )
    assert (first["text"], first["score"]) == ('a; "b", c', "4,5")
    assert (second["text"], second["score"]) == ("d,e", "")
    unnamed = {name: value for name, value in second.items() if name.startswith("Unnamed")}
    assert unnamed == ({"Unnamed: 0": "1", "Unnamed: 4": ""} if content.startswith(",") else {})


def test_requests_in_tables(tmp_path: Path) -> None:
    """As frames of pandas and polars hold them: each row has some of the columns, and lists may be texts of JSON."""
    chat = [{"role": "user", "content": "hi"}]
    asked: list[dict[str, Any]] = [
        {"custom_id": "a", "prompt": "5", "max_tokens": 3, "bad_words": ["x"]},
        {"messages": chat, "temperature": 0.5, "n": 2},
        {"custom_id": "c", "prompt": "null", "echo": True},
    ]
    lines = [
        {"url": "/v1/completions", "body": asked[0]},
        {"custom_id": "b", "url": "/v1/chat/completions", "body": asked[1]},
    ]
    del asked[0]["custom_id"]
    for data in (asked, lines):
        frame = pandas.DataFrame(data)
        as_text = frame.map(lambda value: json.dumps(value) if isinstance(value, list | dict) else value)
        as_text.to_csv(tmp_path / "in.csv")
        as_text.to_csv(tmp_path / "bare.csv", index=False, sep=";")
        as_text.astype(object).to_parquet(tmp_path / "texts.parquet")
        polars.DataFrame(data).write_parquet(tmp_path / "in.parquet")
        polars.DataFrame(data).write_ndjson(tmp_path / "in.jsonl")
        for name in ("in.csv", "bare.csv", "texts.parquet", "in.parquet", "in.jsonl"):
            made = job(tmp_path / name)
            prepared(made)
            batch = requests.check(inputs.lines_path(made), made, WITH_TEXT)
            assert [line.error for line in batch.lines] == [None] * len(data), name
            found: list[Any] = [work.endpoint for work in batch.works()]
            assert (found[0].prompt, found[0].max_tokens, found[0].bad_words) == ("5", 3, ["x"])
            assert (found[1].temperature, found[1].n) == (0.5, 2)
            assert found[1].messages[0]["content"] == "hi"


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 16])
def test_arrays_are_read_piece_by_piece(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "CHUNK", chunk)
    draw = random.Random(chunk)
    data: list[Any] = [
        {"n": draw.randrange(10**6), "deep": [[{}, [], "]},{"] * draw.randrange(4)], "text": "\\\"" * draw.randrange(9)}
        for _ in range(40)
    ] + [12345678, -1.5e-7, "a, b]", None, True, [1, [2]], {"é": "🦜"}]  # fmt: skip
    for text in (
        json.dumps(data),
        json.dumps(data, indent=3, ensure_ascii=False),
        f" [{chunk}\n] ",
        "[]",
        "[ ]",
    ):
        (tmp_path / "in.json").write_text(text)
        file = io.BytesIO()
        forms.write_lines(tmp_path / "in.json", file, print)
        assert [json.loads(line) for line in file.getvalue().splitlines()] == json.loads(text)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("in.json", b'[{"a": 1} {"a": 2}]', "a comma or the end is missing at character 11"),
        ("in.json", b'[{"a": 1},\n{"a": ]', "a comma or the end is missing at character 19"),
        ("in.json", b'[{"a": 1},\n{"a": "]', "the end of an element is missing at character 20"),
        ("in.json", b'[{"a": 1},]', "an element is missing at character 11"),
        ("in.json", b'[{"a": 1}', "a comma or the end is missing at character 10"),
        ("in.json", b'[{"a": 1}] {}', "something follows its end at character 12"),
        ("in.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:-9], "is damaged or incomplete (gzip: "),
        ("in.jsonl.gz", b"\x1f\x8b" + b"x" * 99, "is damaged or incomplete (gzip: "),
        ("in.jsonl.zst", zstandard.compress(random.Random(1).randbytes(999))[:-9], "it is incomplete (zstd)"),
        ("in.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"x" * 99, "it is damaged (zstd"),
        ("in.parquet", b"PAR1 and nothing else", "is damaged or not a Parquet file: "),
        ("in.csv", b"", "needs a first line with a different name for each column"),
        ("in.csv", b"a,a\n1,2\n", "needs a first line with a different name for each column"),
        ("in.csv", b",,\n1,2,3\n", "needs a first line with a different name for each column"),
        ("in.csv", b"prompt,id\na,1\n", "has a column 'id', which is not a key of a request; say in the job"),
        ("in.csv", b"text,label\n1,2\n", "has the columns 'text', 'label', none of which is a key of a request; say"),
        ("in.csv", "prompt\na\n".encode("utf-16-le"), "is UTF-16; save it as UTF-8"),
        ("in.csv", "prompt\na\n".encode("utf-16-be"), "is UTF-16; save it as UTF-8"),
        ("in.dat", b"PAR1...", "is Parquet; give it as a file whose name ends in .parquet"),
    ],
)  # fmt: skip
def test_inputs_that_cannot_be_used(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(JobError) as caught:
        prepared(job(tmp_path / name))
    assert said in str(caught.value)
    assert not (tmp_path / "out" / INPUT).exists()


@pytest.mark.parametrize("chunk", [1, 1 << 16])
def test_bad_elements_of_an_array_cost_no_other(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_array, "MAX_LINE", 20_000)
    monkeypatch.setattr(json_array, "CHUNK", chunk)
    bad = [
        '{"prompt": "a", "metadata": ' + "[" * 3000 + "]" * 3000 + "}",
        '{"prompt": 01}',
        '{"prompt": "two\nlines"}',
        '{"prompt": "' + r"\"\\[" * 5000 + '"}',
        "[" * 30_000 + "]" * 30_000,
        '{"prompt": "a"]',
        "nonsense",
    ]
    path = tmp_path / "in.json"
    pairs = (f'{{"prompt": "good {number}"}}, {one}' for number, one in enumerate(bad))
    path.write_text(f"[{', '.join(pairs)}]")
    made = job(path)
    prepared(made)
    batch = requests.check(inputs.lines_path(made), made, WITH_TEXT, unit="Row")
    assert [line.error is None for line in batch.lines] == [True, False] * len(bad)
    found = [work.endpoint.prompt for work in batch.works()]  # type: ignore[attr-defined]
    assert found == [f"good {number}" for number in range(len(bad))]


def written(path: Path, content: bytes) -> Path:
    """The file with this content, compressed as its name says."""
    if path.suffix == ".zst":
        content = pytest.importorskip("zstandard").compress(content, 1)
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "in.jsonl.zst"])
@pytest.mark.parametrize(
    "bad",
    [
        b"[5]x", b'["a"', b"[[[[ oops", b"[" + b"1, " * 9000 + b"x", b"[" * 50_000 + b"5",
        b"[" + b"1, " * 90_000 + b"x",
        b"[" + b"1, " * 200_000 + b"1]", b"[" + b"1, " * (MAX_LINE // 3) + b"x", b"[" + b"7," * MAX_LINE + b"7]",
    ],
    ids=range(9),
)  # fmt: skip
def test_a_bad_first_line_makes_no_array_of_the_others(bad: bytes, name: str, tmp_path: Path) -> None:
    made = job(written(tmp_path / name, bad + b'\n{"prompt": "a"}\n'))
    prepared(made)
    batch = requests.check(inputs.lines_path(made), made, WITH_TEXT)
    assert [line.error is None for line in batch.lines] == [False, True]


@pytest.mark.parametrize("between", [b",\n", b"\n,", b", \n  "])
def test_the_first_line_of_an_array_may_be_long(between: bytes, tmp_path: Path) -> None:
    """Longer than a line may be, or malformed."""
    many = MAX_LINE // 1000
    first = b", ".join([b'{"prompt": "' + b"a" * 1000 + b'"}'] * many)
    for name, text, count in (
        ("in.json", first, many), ("in.json", b'{"prompt": "two\nlines"}', 1), ("in.json.zst", first, many)
    ):  # fmt: skip
        lines = prepared(job(written(tmp_path / name, b"[" + text + between + b'{"prompt": "b"}]')))
        assert (len(lines), lines[-1]) == (count + 1, b'{"prompt": "b"}')


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("in.json", b'[[{"prompt": "a"}]]', "is a JSON array; write one object per line"),
        ("in.jsonl.gz", gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), "is compressed with gzip; unpack it"),
        ("in.jsonl.gz", gzip.compress(b"%PDF-1.7", mtime=0), "is a PDF; extract its text"),
        ("in.jsonl.zst", zstandard.compress(b"text\nother\n"), "has texts in its lines"),
    ],
)  # fmt: skip
def test_the_input_is_named_and_not_the_file_of_its_lines(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    made = job(tmp_path / name)
    prepared(made)
    with pytest.raises(JobError) as caught:
        requests.check(inputs.lines_path(made), made, WITH_TEXT)
    assert str(caught.value).startswith(f"The input {tmp_path / name} {said}")


def test_sentences_of_a_library_end_with_one_full_stop(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["one text", "another"]}), path)
    good = path.read_bytes()
    for wrong in (good[:-9], good[:4] + b"U" * 60 + good[64:], b"PAR1 and nothing else"):
        path.write_bytes(wrong)
        with pytest.raises(JobError, match=r"The input .*in\.parquet .*[^.]\.$"):
            prepared(job(path))
    parquet.write_table(pyarrow.table({}), path)
    with pytest.raises(JobError, match=r"in\.parquet has no columns; give a table of requests\.$"):
        prepared(job(path))


def test_long_rows_are_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a line of a table nor an element of an array, however long, takes more memory than a few lines may."""
    longest, many = 1 << 18, 2_000_000
    for module in (delimited, json_array):
        monkeypatch.setattr(module, "MAX_LINE", longest)
    # Fewer characters than a line may have bytes, and more bytes.
    wide = "\N{GRINNING FACE}".encode() * (longest // 5)
    text = {
        "in.csv": b"ab," * many,
        "in.json": b"ab" * many,
        "wide.csv": b"ab," + wide * 2,
        "wide.json": wide * 2,
    }
    for name, long in text.items():
        content = b'[{"prompt": "a"}, {"prompt": "' + long + b'"}, {"prompt": "c"}]'
        (tmp_path / name).write_bytes(
            b"prompt,x\na,1\n" + long + b"\nc,2\n" if name.endswith(".csv") else content
        )
    for name in text:
        tracemalloc.start()
        lines = prepared(job(tmp_path / name, 'request.prompt="x"'))
        _, maximum = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert [json.loads(line).get("prompt") for line in lines] == ["a", None, "c"]
        assert "longer than" in json.loads(lines[1])[ROW_ERROR]
        assert maximum < 8 * longest


@pytest.mark.parametrize("name", ["in.csv", "in.tsv.gz", "in.parquet"])
def test_a_table_that_is_something_else_is_named(name: str, tmp_path: Path) -> None:
    for content, said in (
        ("prompt\na\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (gzip.compress(b"prompt\na\n"), "is compressed with gzip"),
    ):
        if said.endswith("gzip") and not name.endswith(".gz"):
            continue  # a compressed table is read, whatever its name
        with pytest.raises(JobError, match=said):
            prepared(job(written(tmp_path / name, content)))


def test_bad_rows_cost_no_other(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(
        b'prompt,note\na,1\nb\nc,2,3\n\n\xff\xfe,5\n"' + b"x" * MAX_LINE + b'",6\n"d",4\n'
    )
    made = job(tmp_path / "in.csv", 'request.prompt="{prompt}"')
    prepared(made)
    batch = requests.check(inputs.lines_path(made), made, WITH_TEXT, unit="Row")
    told = [line.error for line in batch.lines]
    assert told[:4] == [
        None,
        "Row 2: the row has 1 field(s), and the header has 2.",
        "Row 3: the row has 3 field(s), and the header has 2.",
        "Row 4: the row is not UTF-8 text.",
    ]
    assert told[4] is not None
    assert told[-1] is None
    assert [work.endpoint.prompt for work in batch.works()] == ["a", "d"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("longest", [100, 30_000])
def test_a_record_that_is_too_long_is_one_error(
    longest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its fields hold: its end is where its quotes say, in a line of any length."""
    monkeypatch.setattr(delimited, "MAX_LINE", longest)
    monkeypatch.setattr(delimited, "CHUNK", 7)
    draw = random.Random(longest)
    many = longest // 10 + 1
    drawn = "".join(draw.choice(("a", ",", "\n", '""', "\r\n")) for _ in range(4000)) * (many // 400 + 1)
    wrong = [
        'n,"' + "one, line\n" * many + '"',
        '"' + 'a ""quote"", b\r\n' * many + '",n',
        "n," + "q" * 10 * many,
        '"' + "q" * 10 * many + '\n,\n",n',
        '"n"x"' + "q" * 10 * many + '",n',
        f'n,"{drawn}"',
    ]
    (tmp_path / "in.csv").write_text(
        "prompt,note\n" + "".join(f"{one}\ngood,{number}\n" for number, one in enumerate(wrong)), newline=""
    )
    lines = [json.loads(line) for line in prepared(job(tmp_path / "in.csv", 'request.prompt="x"'))]
    assert lines[1::2] == [{"prompt": "good", "note": str(number)} for number in range(len(wrong))]
    assert all("the record is longer than" in line[ROW_ERROR] for line in lines[::2])
    assert len(lines) == 2 * len(wrong)


def test_a_quote_that_is_not_closed_is_said(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text('prompt,note\n"a\nb",1\n"c,2\nd,3\n')
    lines = [json.loads(line) for line in prepared(job(tmp_path / "in.csv", 'request.prompt="x"'))]
    assert lines == [
        {"prompt": "a\nb", "note": "1"},
        {ROW_ERROR: "a quote in the record that begins in line 4 of the input is not closed"},
    ]


def test_long_texts_of_a_dictionary_are_made_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text that stands once in a Parquet file may be that of every row."""
    long, many = "a" * (MAX_LINE // 8), 300
    table = pyarrow.table({"prompt": ["short", *[long] * many], "note": list(range(many + 1))})
    parquet.write_table(table, tmp_path / "in.parquet", compression="zstd")
    assert (tmp_path / "in.parquet").stat().st_size < len(long)
    lengths: list[int] = []

    class Lines(io.BytesIO):
        def write(self, line: Any) -> int:
            lengths.append(len(line))
            return len(line)

    monkeypatch.setattr(batch_parquet, "BYTES", 4 * len(long))
    tracemalloc.start()
    forms.write_lines(tmp_path / "in.parquet", Lines(), print)
    _, maximum = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(lengths) == many + 1
    assert sum(lengths) > many * len(long)
    assert maximum < 12 * len(long)


def test_texts_that_a_dictionary_does_not_hold_are_not_kept(tmp_path: Path) -> None:
    """A writer stops to fill a dictionary at 1 MiB; the texts behind it must not be collected in one."""
    count, text = 30_000, "of several sentences " * 20
    texts = [f"{number} {text}" for number in range(count)]
    parquet.write_table(pyarrow.table({"prompt": texts}), tmp_path / "in.parquet")
    before = pyarrow.total_allocated_bytes()
    held: list[int] = []

    class Lines(io.BytesIO):
        def write(self, line: Any) -> int:
            held.append(pyarrow.total_allocated_bytes() - before)
            return len(line)

    forms.write_lines(tmp_path / "in.parquet", Lines(), print)
    assert len(held) == count
    assert max(held) < count * len(text) // 2


def test_values_of_parquet_as_json(tmp_path: Path) -> None:
    row = {
        "messages": [{"role": "user", "content": "hi"}], "n": 3, "x": 0.5, "no": None,
        "day": datetime.date(2024, 2, 29), "nan": float("nan"), "raw": b"ab",
    }  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "in.parquet")
    (line,) = prepared(job(tmp_path / "in.parquet", 'request.prompt="x"'))
    assert json.loads(line) == {**row, "day": "2024-02-29", "nan": None, "raw": "ab"}


def test_bytes_of_parquet_are_texts(tmp_path: Path) -> None:
    texts = ["naïve", None, "", "tab\tend"]
    raw = [text if text is None else text.encode() for text in texts] + [b"\xff\xd8 a picture"]
    chats = [[{"role": b"user", "content": one}] for one in raw]
    columns: dict[str, Any] = {
        "raw": raw,
        "large": pyarrow.array(raw, pyarrow.large_binary()),
        "often": pyarrow.array(raw).dictionary_encode(),
        "fixed": pyarrow.array([b"ab"] * 5, pyarrow.binary(2)),
        "messages": chats,
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    lines = [json.loads(line) for line in prepared(job(tmp_path / "in.parquet", 'request.prompt="x"'))]
    for line, text in zip(lines, [*texts, None], strict=True):
        assert line == {"raw": text, "large": text, "often": text, "fixed": "YWI=",
                        "messages": [{"role": "user", "content": text}]}  # fmt: skip


def test_times_of_parquet(tmp_path: Path) -> None:
    """Nanoseconds are cut to microseconds, whether pandas is there or not; a time beyond Python's costs its row."""
    second, far = 1_700_000_000, 10**12
    columns = {
        "prompt": pyarrow.array(["a", "b", "c"]),
        "stamp": pyarrow.array([second * 10**9 + 123_456_789, None, 0], pyarrow.timestamp("ns")),
        "zoned": pyarrow.array([second * 10**9, None, 0], pyarrow.timestamp("ns", "Asia/Tokyo")),
        "time": pyarrow.array([1_000_000_001, None, 0], pyarrow.time64("ns")),
        "length": pyarrow.array([86_400 * 10**9 + 999, None, 0], pyarrow.duration("ns")),
        "far": pyarrow.array([second, far, None], pyarrow.timestamp("s")),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    first, wrong, last = map(json.loads, prepared(job(tmp_path / "in.parquet", 'request.prompt="x"')))
    assert first == {
        "prompt": "a", "stamp": "2023-11-14T22:13:20.123456", "zoned": "2023-11-15T07:13:20+09:00", "time": "00:00:01",
        "length": "P1D", "far": "2023-11-14T22:13:20",
    }  # fmt: skip
    assert wrong == {ROW_ERROR: "the row has a value that cannot be read: date value out of range"}
    assert (last["prompt"], last["far"]) == ("c", None)


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def given(content: bytes) -> list[bytes]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))  # type: ignore[arg-type]
        made = spec.load(None, input="-", output=str(tmp_path / "out"))
        return prepared(made)

    assert given(b'{"prompt": "a"}\n{"prompt": "b"}\n') == [b'{"prompt": "a"}', b'{"prompt": "b"}']
    assert given(gzip.compress(b'[{"prompt": "c"}]')) == [b'{"prompt": "c"}']
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(JobError, match="Standard input works only without mpiexec"):
        given(b"")


def test_templates() -> None:
    made = Template(
        {
            "url": "/v1/chat/completions",
            "messages": [
                {"role": "user", "content": 'Is {a} {{"x": {b}}}?'},
                {"role": "user", "content": "{b}"},
            ],
            "max_tokens": "{b}",
            "stop": "{list}",
            "temperature": 0,
        }
    )
    assert made.columns == {"a", "b", "list"}
    row = {"a": 'a "word"', "b": 7, "list": ["x"], "custom_id": "me", "more": 1}
    assert made.line(row) == {
        "custom_id": "me",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "messages": [
                {"role": "user", "content": 'Is a "word" {"x": 7}?'},
                {"role": "user", "content": "7"},
            ],
            "max_tokens": 7,
            "stop": ["x"],
            "temperature": 0,
        },
    }
    assert Template({"messages": "{chat}"}).line({"chat": [{"role": "user"}]}) == {
        "messages": [{"role": "user"}]
    }
    assert Template({"prompt": "{a}", "custom_id": "{n}"}).line({"a": "x", "n": 5})["custom_id"] == "5"
    for lacking, said in (
        ({"b": 1}, "the row has no column 'a'; it has 'b'"),
        ({"a": None}, "the column 'a' is null"),
    ):
        with pytest.raises(RequestError, match=said):
            Template({"prompt": "{a}"}).line(lacking)
    with pytest.raises(
        JobError, match=r"request.prompt has a '{' that is not part of a column name; write '{{'"
    ):
        Template({"prompt": 'Answer {"a": 1'})


def test_columns_of_parquet_that_have_one_name(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays(
        [pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"]
    )
    parquet.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(JobError, match="has two columns 'prompt'"):
        prepared(job(tmp_path / "in.parquet"))


def test_the_job_may_say_it_at_its_top(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(
        'input = "in.csv"\noutput = "out"\nprompt = "Label: {text}"\n[request]\nmax_tokens = 2\n'
    )
    made = spec.load(tmp_path / "job.toml")
    assert made.request == {"prompt": "Label: {text}", "max_tokens": 2}
    assert spec.load(tmp_path / "job.toml", ["prompt=other {text}", "request={max_tokens=3}"]).request == {
        "prompt": "other {text}",
        "max_tokens": 3,
    }
    assert made.identity()["request"] == made.request
    (tmp_path / "in.csv").write_text("title\na\n")
    with pytest.raises(JobError, match="has no column 'text', which the job's request names; it has 'title'"):
        prepared(spec.load(tmp_path / "job.toml", output=str(tmp_path / "out")))
    with pytest.raises(JobError, match="both prompt and request"):
        spec.load(tmp_path / "job.toml", ['request={prompt="a"}', "prompt=b"])
