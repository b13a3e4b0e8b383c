"""What is kept of millions of lines: few bytes each, and exactly what was put in."""

from __future__ import annotations

import gc
import json
import os
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from mpillm.batch import lines as capacity
from mpillm.batch import order, requests
from mpillm.batch.lines import Lines
from mpillm.batch.names import PARTS, RECENT, NumbersByName
from mpillm.batch.order import Order
from mpillm.batch.work import Line
from mpillm.errors import Interrupted
from mpillm.store.journal import Journal
from mpillm.store.output import Claim
from mpillm.store.records import Result, line_key
from tests.job_helpers import WITHOUT_TEXT, job, works


def a_line(draw: random.Random, number: int) -> Line:
    name = "".join(draw.choices("ab\0\N{SNOWMAN}", k=draw.choice([1, 9, 4096])))
    error = draw.choice([None, "Line: wrong.", "e" * 400])
    return Line(number, draw.randrange(1 << 45), draw.randrange(1 << 20), name, draw.randbytes(16), error)


@pytest.mark.parametrize("held", [1, 5000, 1 << 20])
def test_lines_are_those_that_were_put_in(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "HELD", held)
    draw = random.Random(held)
    made, expected = Lines(), []
    for number in range(1, 301):
        expected.append(a_line(draw, number))
        made.append(expected[-1])
        if draw.random() < 0.2:
            index = draw.randrange(number)
            expected[index] = replace(expected[index], error=None, custom_id="other" * draw.randrange(900))
            made.replace(index, expected[index])
        assert made[draw.randrange(-1, 0)] == expected[-1]
    assert list(made) == expected
    assert len(made) == 300


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "HELD", 1)
    made = Lines(lambda: os.open("/dev/full", os.O_RDWR))
    with pytest.raises(Interrupted, match=r"No space left on device.*about 100 bytes for each line"):
        made.append(a_line(random.Random(1), 1))


def test_names_know_their_numbers() -> None:
    draw, names = random.Random(5), NumbersByName()
    expected: dict[str, int] = {}
    for _ in range(5 * PARTS * RECENT // 2):
        name, number = str(draw.randrange(3 * PARTS * RECENT)), draw.randrange(1 << 60)
        assert names.add(name, number) == expected.setdefault(name, number)
    assert len(names) == len(expected)
    assert names.numbers().tolist() == sorted(expected.values())
    middle = sorted(expected.values())[len(expected) // 2]
    names.drop_from(middle)
    for name, number in expected.items():
        assert names.get(name) == (number if number < middle else None)
        assert (name in names) is (number < middle)


def test_names_take_no_more_while_their_tables_grow() -> None:
    count, names = 50_000, NumbersByName()
    tracemalloc.start()
    try:
        for number in range(count):
            names.add(f"record {number}", number)
        maximum = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # 16 bytes each, and the dicts of what is not sorted yet; one table that grew as a whole took 56.
    assert maximum < 36 * count


def test_pieces_of_an_input_are_ordered_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(9)
    made = works(
        tmp_path,
        *({"prompt": [1 + draw.randrange(2)] * 40, "max_tokens": draw.randrange(1, 9)} for _ in range(50)),
        model=WITHOUT_TEXT,
    )

    def ordered(begin: int, end: int) -> list[int]:
        piece = Order()
        for work in made[begin:end]:
            piece.add(work)
        return [begin + index for index in piece.indices().tolist()]

    expected = [index for begin in range(0, 50, 16) for index in ordered(begin, min(begin + 16, 50))]
    monkeypatch.setattr(order, "PIECE", 16)
    assert ordered(0, 50) == expected
    assert sorted(expected) == list(range(50)) != expected


def test_a_line_takes_few_bytes_from_the_check_to_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More lines take more bytes of the tables alone, however long their names are."""
    monkeypatch.setattr(capacity, "HELD", 1 << 12)
    monkeypatch.setattr("mpillm.batch.names.RECENT", 1)
    held = {}
    for count in (50, 800, 1600):
        said = job(tmp_path / str(count))
        said.input_path.parent.mkdir()
        with said.input_path.open("w") as file:
            for number in range(count):
                body = {"custom_id": f"{number} {'long' * 20}", "prompt": [1 + number % 90], "max_tokens": 1}
                file.write(json.dumps(body if number % 7 else {"prompt": number}) + "\n")
        gc.collect()
        tracemalloc.start()
        try:
            with Claim(said.output_path) as claim:
                batch = requests.check(said.input_path, said, WITHOUT_TEXT, open_file=claim.directory.unnamed)
                assert batch.bad == -(-count // 7)
                with Journal(claim, {}, batch.lines) as journal:
                    for line in batch.unanswered(journal.done):
                        journal.append(Result(line.custom_id, line_key(line), 200, b"{}"))
                    journal.flush()
                    assert len(journal.done) == count - batch.bad
                    gc.collect()
                    held[count] = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
    # 28 bytes, and what arrays have in reserve.
    assert 10 * 800 < held[1600] - held[800] < 56 * 800
