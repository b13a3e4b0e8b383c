"""LoRA adapters: what PEFT computes with them, alone and beside others, on any layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mpillm.engine.request import FinishedCompletion, Request
from tests.model.adapted import both, check_both, folder, numbered
from tests.model.checks import digest, requests_of
from tests.model.engine_harness import run_engine
from tests.model.golden import ADAPTERS, adapted_model, golden, model_path


@pytest.mark.parametrize("name", ADAPTERS)
def test_values_are_those_of_peft(name: str) -> None:
    requests, job = both(name)
    model = model_path(adapted_model(name))
    completions = run_engine(model, requests, **job)
    check_both(name, completions)
    del job["adapters"]
    assert digest(run_engine(model, requests[1::2], **job)) == digest(completions[1::2])


def mixed() -> list[Request]:
    """The same prompts for the base, two adapters, and the first adapter again under another number."""
    requests = requests_of(golden("chat"))
    shared = tuple(range(3, 3 + 70))  # whose blocks nobody with another adapter may use
    requests += [Request(f"shared-{i}", (*shared, 5 + i), max_tokens=4, logprobs=2) for i in range(2)]
    prefixes = ("base", "all", "some", "again")
    return [one for number, prefix in enumerate(prefixes) for one in numbered(requests, number, prefix)]


MIXED = {"1": folder("chat_all"), "2": folder("chat_some"), "3": folder("chat_all")}


def run_mixed(requests: list[Request], **job: Any) -> list[FinishedCompletion]:
    """What one rank makes of them."""
    return run_engine(model_path("chat"), requests, threads=1, adapters=MIXED, **job)


def parts(completions: list[FinishedCompletion]) -> list[str]:
    """A digest for each adapter; that of the same adapter under two numbers is of the same answers."""
    each = len(completions) // 4
    return [
        digest([replace(one, request=replace(one.request, id=str(i))) for i, one in enumerate(group)])
        for group in (completions[at : at + each] for at in range(0, len(completions), each))
    ]


@pytest.mark.parametrize("job", [{}, {"activations": "f32", "kv_type": "f32", "quantize": "q8_0"}])
def test_answers_are_the_same_alone_and_beside_other_adapters(job: dict[str, Any]) -> None:
    requests = mixed()
    each = len(requests) // 4
    want = parts(run_mixed(requests, **job))
    assert want[1] == want[3]
    assert len(set(want)) == 3
    base = run_engine(model_path("chat"), requests[:each], threads=1, **job)  # no adapters at all
    alone = [one for at in range(each, 4 * each, each) for one in run_mixed(requests[at : at + each], **job)]
    assert parts(base + alone) == want
    for more in (
        {"max_num_seqs": 1, "prefix_sharing": False},
        {"max_num_batched_tokens": 13, "max_num_seqs": 5},
        {"weights": 40_000},
        {"kv": "16KiB"},
    ):
        assert parts(run_mixed(requests[::-1], **job, **more)[::-1]) == want
