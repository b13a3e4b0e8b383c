"""A few hundred damaged inputs for every reader; `python -m tests.fuzz TARGET` goes on for as long as one likes."""

from __future__ import annotations

import pytest

from mpillm.batch.endpoints import ENDPOINTS
from tests.fuzz.fields import FIELDS
from tests.fuzz.mutate import cases
from tests.fuzz.targets import TARGETS, make

FEW = {"packed": 60, "tokenizer": 60}


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_bytes_are_taken_or_refused_in_a_sentence(name: str) -> None:
    with make(name) as target:
        for number, case in enumerate(cases(target.seeds, target.words, FEW.get(name, 300), seed=5)):
            try:
                target.run(case)
            except BaseException:
                print(f"case {number}: {case[:2000]!r}")
                raise


def test_each_key_of_a_body_has_values() -> None:
    keys = {key for endpoint in ENDPOINTS for key in endpoint.__struct_fields__}
    assert keys - FIELDS.keys() == {"messages", "prompt", "input"}
    assert FIELDS.keys() <= keys
