"""Compare the results of two runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpillm.api.results import Results
from mpillm.store.hdf5 import existing_file
from mpillm.store.results import HDF5
from mpillm.words import count_of

SHOWN = 10  # requests that differ
WORDS = 24  # characters of a text, from where it differs
VALUES = {  # the values of a choice, and their names in sentences
    "logprobs": "log-probabilities", "prompt_logprobs": "prompt log-probabilities", "embeddings": "embeddings",
    "loglikelihoods": "log-likelihoods", "probabilities": "probabilities", "relevance": "scores of relevance",
}  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """A request that the two runs have answered differently."""

    custom_id: str
    what: str  # a sentence
    texts: str = ""  # how the texts go on where they part, of the requests that are shown

    def __str__(self) -> str:
        return f"{self.custom_id}: {self.what}{self.texts}"


@dataclass
class Comparison:
    """The differences between two runs; requests are compared by their custom_id."""

    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)  # a sentence for each that differs
    equal: int = 0
    different: list[Difference] = field(default_factory=list)
    largest: dict[str, float] = field(default_factory=dict)  # absolute difference of values, by their group

    @property
    def same(self) -> bool:
        """Whether all requests are in both runs, with the same answers."""
        return not (self.only_first or self.only_second or self.different)

    def lines(self) -> Iterator[str]:
        """Yield the comparison as text."""
        yield from (f"setting    {line}" for line in self.settings)
        yield f"equal      {count_of(self.equal, 'request')}"
        yield f"different  {count_of(len(self.different), 'request')}"
        yield from (f"  {difference}" for difference in self.different[:SHOWN])
        if len(self.different) > SHOWN:
            yield f"  and {len(self.different) - SHOWN} more"
        for which, names in (("first", self.only_first), ("second", self.only_second)):
            if names:
                yield f"only in the {which} run: {count_of(len(names), 'request')}, such as {names[0]}"
        for group, distance in self.largest.items():
            yield f"{group} differ by at most {distance:.3g}, as far as the tokens are equal"


def compare(first: Results, second: Results) -> Comparison:
    """Compare the answers of two finished runs, and the settings that decide them."""
    made = Comparison(settings=list(_settings(first, second)))
    at = [{name: row for row, name in enumerate(run.custom_ids)} for run in (first, second)]
    made.only_first = [name for name in at[0] if name not in at[1]]
    made.only_second = [name for name in at[1] if name not in at[0]]
    for name, row in at[0].items():
        if name in at[1]:
            told = _answer(first, row, second, at[1][name], made.largest)
            if told is None:
                made.equal += 1
            else:
                made.different.append(Difference(name, told))
    shown = made.different[:SHOWN]
    texts = [_texts(run, {one.custom_id for one in shown}) for run in (first, second)]
    made.different[:SHOWN] = [
        replace(one, texts=_parting(*(of.get(one.custom_id) for of in texts))) for one in shown
    ]
    return made


def _texts(run: Results, wanted: set[str]) -> dict[str, str | None]:
    """Return the texts of some requests, by their custom_id."""
    rows = (row for row in run.rows() if row["custom_id"] in wanted)
    return {row["custom_id"]: row["text"] for row in itertools.islice(rows, len(wanted))}


def _parting(a: str | None, b: str | None) -> str:
    """Return the continuations of two texts from the first difference on; empty if the texts are equal."""
    if not a or not b or a == b:
        return ""
    pairs = enumerate(zip(a, b, strict=False))
    place = next((at for at, (x, y) in pairs if x != y), min(len(a), len(b)))
    return f", {a[place : place + WORDS]!r} and {b[place : place + WORDS]!r}"


def _settings(first: Results, second: Results) -> Iterator[str]:
    one, two = (dict(_attributes(run.directory)) for run in (first, second))
    for key in [*one, *(key for key in two if key not in one)]:
        before, after = one.get(key, "unset"), two.get(key, "unset")
        if before != after:
            yield f"{key}: {before} and {after}"


def _attributes(directory: Path) -> Iterator[tuple[str, str]]:
    """Yield the attributes of results.h5; those that are JSON objects key by key."""
    with existing_file(directory / HDF5) as file:
        for name, value in file.attrs.items():
            text = str(value)
            if not text.startswith("{"):
                yield name, text
                continue
            for key, item in json.loads(text).items():
                yield f"{name} {key}", json.dumps(item, ensure_ascii=False)


def _answer(first: Results, i: int, second: Results, j: int, largest: dict[str, float]) -> str | None:
    """Return a sentence on the difference between two answers; None if they are equal."""
    status = first.status[i], second.status[j]
    if status[0] != status[1]:
        return f"status {status[0]} and {status[1]}"
    choices = [range(run.choices[row], run.choices[row + 1]) for run, row in ((first, i), (second, j))]
    if len(choices[0]) != len(choices[1]):
        return f"{len(choices[0])} and {count_of(len(choices[1]), 'choice')}"
    told = None
    for number, (a, b) in enumerate(zip(*choices, strict=True)):
        where = f"choice {number}, " if len(choices[0]) > 1 else ""
        prompts = first.prompts[first.prompt_of[a]], second.prompts[second.prompt_of[b]]
        for what, (x, y) in (("prompt's token", prompts), ("token", (first.tokens[a], second.tokens[b]))):
            place = _first_difference(x, y)
            if place is not None:
                if what == "token":
                    _distance(
                        "log-probabilities", first.logprobs[a][:place], second.logprobs[b][:place], largest
                    )
                token = [ids[place] if place < len(ids) else "the end" for ids in (x, y)]
                return f"{where}{what} {place}: {token[0]} and {token[1]}"
        if first.finish_reasons[a] != second.finish_reasons[b]:
            return f"{where}finish reason {first.finish_reasons[a]} and {second.finish_reasons[b]}"
        told = told or _values(first, a, second, b, where, largest)
    return told


def _first_difference(a: NDArray[Any], b: NDArray[Any]) -> int | None:
    """Return the place of the first difference between two arrays; None if they are equal."""
    length = min(len(a), len(b))
    unequal = np.flatnonzero(a[:length] != b[:length])
    if len(unequal):
        return int(unequal[0])
    return None if len(a) == len(b) else length


def _values(
    first: Results, a: int, second: Results, b: int, where: str, largest: dict[str, float]
) -> str | None:
    told = None
    for name, group in VALUES.items():
        x, y = getattr(first, name)[a], getattr(second, name)[b]
        if len(x) != len(y):
            return f"{where}{len(x)} and {len(y)} {group}"
        distance = _distance(group, x, y, largest)
        if distance is not None:
            told = told or f"{where}{group} differ by {distance:.3g} at most"
    return told


def _distance(group: str, x: NDArray[Any], y: NDArray[Any], largest: dict[str, float]) -> float | None:
    """Return the largest distance of two arrays' values, counted into `largest`; None if equal, or of other lengths."""
    if len(x) != len(y) or np.array_equal(x, y, equal_nan=True):
        return None
    unequal = (x != y) & ~(np.isnan(x) & np.isnan(y))  # infinities that are equal have no difference
    distance = float(np.max(np.abs(x[unequal].astype(np.float64) - y[unequal].astype(np.float64))))
    largest[group] = max(largest.get(group, 0.0), distance)
    return distance
