"""`mpillm compare`: what two runs have in common, on results that are written by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import pytest

from mpillm.api.compare import VALUES, compare
from mpillm.api.results import read_results


def write(folder: Path, answers: dict[str, dict[str, Any]], **facts: str) -> Path:
    """A run whose requests have one choice each, with `tokens`, `text`, and values by their group."""
    folder.mkdir()
    texts = (
        {
            "custom_id": name,
            "error": None,
            "response": {"status_code": 200, "body": {"choices": [{"text": of.get("text", "")}]}},
        }
        for name, of in answers.items()
    )
    (folder / "results.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in texts))
    with h5py.File(folder / "results.h5", "w") as h5:
        h5.attrs.update(facts)
        count = len(answers)
        h5["requests/custom_id"] = [name.encode() for name in answers]
        h5["requests/status"] = [of.get("status", 200) for of in answers.values()]
        h5["requests/choices"] = range(count + 1)
        h5["choices/finish_reason"] = [of.get("reason", "length").encode() for of in answers.values()]
        h5["choices/prompt"] = range(count)
        _ragged(h5, "prompts", "ids", [of.get("prompt", [1, 2]) for of in answers.values()], "i4")
        _ragged(h5, "tokens", "ids", [of.get("tokens", []) for of in answers.values()], "i4")
        for group in VALUES:
            _ragged(h5, group, "values", [of.get(group, []) for of in answers.values()], "f8")
    return folder


def _ragged(h5: h5py.File, group: str, name: str, rows: Sequence[Sequence[float]], kind: str) -> None:
    h5.create_dataset(f"{group}/{name}", data=[value for row in rows for value in row], dtype=kind)
    h5[f"{group}/offsets"] = [sum(map(len, rows[:end])) for end in range(len(rows) + 1)]


def compared(folder: Path, one: dict[str, dict[str, Any]], two: dict[str, dict[str, Any]]) -> list[str]:
    found = compare(*(read_results(write(folder / str(i), run)) for i, run in enumerate((one, two))))
    return list(found.lines())


def test_log_probabilities_count_as_far_as_tokens_are_the_same(tmp_path: Path) -> None:
    """The distance behind the first token that differs says nothing; one answer goes on where the other one ends."""
    one = {
        "parts": {"tokens": [5, 6, 7], "logprobs": [-0.5, -1.0, -9.0], "text": "so it is"},
        "ends": {"tokens": [5, 6], "logprobs": [-0.5, -1.0], "text": "so it"},
        "same": {"tokens": [5], "logprobs": [-0.5]},
    }
    two = {
        "same": {"tokens": [5], "logprobs": [-0.5]},
        "ends": {"tokens": [5, 6, 8], "logprobs": [-0.5, -1.125, -3.0], "text": "so it was"},
        "parts": {"tokens": [5, 6, 8], "logprobs": [-0.25, -1.0, -1.0], "text": "so it was"},
    }
    assert compared(tmp_path, one, two) == [
        "equal      1 request",
        "different  2 requests",
        "  parts: token 2: 7 and 8, 'is' and 'was'",
        "  ends: token 2: the end and 8, '' and ' was'",
        "log-probabilities differ by at most 0.25, as far as the tokens are equal",
    ]


@pytest.mark.parametrize("group", VALUES)
def test_values_of_every_kind_are_compared(group: str, tmp_path: Path) -> None:
    """Also those of classifiers and of multiple choices, whose tokens are the prompts alone."""
    one, two = (
        {"r": {group: values}} for values in ([0.5, -math.inf, math.nan], [0.75, -math.inf, math.nan])
    )
    assert compared(tmp_path, one, two) == [
        "equal      0 requests",
        "different  1 request",
        f"  r: {VALUES[group]} differ by 0.25 at most",
        f"{VALUES[group]} differ by at most 0.25, as far as the tokens are equal",
    ]


def test_requests_are_found_by_their_names(tmp_path: Path) -> None:
    """In any order; what one run lacks, and answers of another kind."""
    one = {
        "a": {"tokens": [5]},
        "b": {"tokens": [6]},
        "c": {"embeddings": [1.0]},
        "d": {},
        "e": {"tokens": [7]},
    }
    two = {
        "d": {"status": 400},
        "c": {"logprobs": [1.0]},
        "b": {"prompt": [1, 3]},
        "a": {"tokens": [5]},
        "f": {},
    }
    assert compared(tmp_path, one, two) == [
        "equal      1 request",
        "different  3 requests",
        "  b: prompt's token 1: 2 and 3",
        "  c: 0 and 1 log-probabilities",
        "  d: status 200 and 400",
        "only in the first run: 1 request, such as e",
        "only in the second run: 1 request, such as f",
    ]


def test_another_model_is_named(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {}, model='{"name": "a", "layers": 2}', job="{}")
    two = write(tmp_path / "two", {}, model='{"name": "b", "layers": 2}', job='{"sampling.seed": 3}')
    found = compare(read_results(one), read_results(two))
    assert found.settings == ['model name: "a" and "b"', "job sampling.seed: unset and 3"]
    assert found.same
