"""Journals of a few lines: what tests of the journal write and find in them."""

from __future__ import annotations

from pathlib import Path

from mpillm.engine.request import PartialCompletion
from mpillm.store.journal import Journal
from mpillm.store.output import Claim
from mpillm.store.records import PartialResult, Result, line_key
from tests.job_helpers import lines, result

IDENTITY = {"model": "abc", "sampling.seed": 3, "sampling.stop": ["a"], "sampling.temperature": 0.1}


NAMES = ("a", "b", "c", "d", "e")


def finish(folder: Path, *names: str, of: tuple[str, ...] = NAMES) -> None:
    """Run until these requests are finished."""
    with Claim(folder) as claim, Journal(claim, IDENTITY, lines(*of)) as journal:
        for name in names:
            journal.append(result(name))
        journal.flush()


def done(folder: Path, of: tuple[str, ...] = NAMES) -> list[str]:
    with Claim(folder) as claim, Journal(claim, IDENTITY, lines(*of)) as journal:
        for name in journal.finished():
            assert journal.read(name) == result(name)
        return list(journal.finished())


def part(name: str, start: int, *tokens: int, choice: int = 0) -> PartialResult:
    """A stretch of a choice; a token's values are made of it."""
    begun = PartialCompletion(
        tokens=list(tokens),
        logprobs=[-token / 3 for token in tokens],
        top=[[(token, -token / 7), (token + 1, float("-inf"))] for token in tokens],
        prompt_logprobs=[] if start else [-0.1, -0.2],
        prompt_top=[] if start else [[(5, -0.1)], [(6, -1e-300)]],
        seconds_waiting=0.5,
        seconds_running=start + 1.5,
    )
    return PartialResult(name, line_key(lines(name)[0]), choice, start, begun)


def begun(folder: Path, name: str, of: tuple[str, ...] = NAMES) -> dict[int, PartialCompletion]:
    with Claim(folder) as claim, Journal(claim, IDENTITY, lines(*of)) as journal:
        found = journal.partial(next(line for line in lines(*of) if line.custom_id == name))
        assert journal.partial(lines(name)[0]) == {}  # given once
        return found


def append(folder: Path, *records: PartialResult | Result) -> None:
    with Claim(folder) as claim, Journal(claim, IDENTITY, lines(*NAMES)) as journal:
        for record in records:
            journal.append(record)
        assert journal.flush() == sum(isinstance(record, Result) for record in records)
