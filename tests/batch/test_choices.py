"""Multiple choice: log-likelihoods are those of plain scoring, and the prompt is computed once."""

# ruff: noqa: E501 - a table

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mpillm.batch.answers import result_line
from mpillm.comm.program import start
from mpillm.engine.request import Request
from tests.agnostic import harness
from tests.job_helpers import CHAT, TEXT, WITH_TEXT, works
from tests.model.engine_harness import run_engine

PROMPT = "the quick brown fox jumps over a lazy dog while seven wizards box: " * 4
CHOICES = ["positive", " negative", "neutral \N{SNOWMAN}", "positively"]


def answer(work: Any) -> dict[str, Any]:
    completions = run_engine(CHAT, list(work.requests))
    body: dict[str, Any] = json.loads(result_line(work, completions, WITH_TEXT))["response"]["body"]
    return body


def scored(ids: list[int]) -> list[float]:
    """The log-probabilities of all tokens but the first, by plain scoring."""
    (completion,) = run_engine(CHAT, [Request("plain", tuple(ids), max_tokens=0, prompt_logprobs=0)])
    return completion.prompt_logprobs


CHATS = [{"role": "user", "content": "the fox"}]
BODIES = [
    ({"prompt": PROMPT, "choices": CHOICES}, [TEXT.encode(PROMPT + choice) for choice in CHOICES], TEXT.encode(PROMPT)),
    ({"messages": CHATS, "choices": CHOICES}, [[*TEXT.encode_chat(CHATS), *TEXT.encode(one, False)] for one in CHOICES], TEXT.encode_chat(CHATS)),
    ({"prompt": [5, 6, 7, 8], "choices": [[9], [10, 11], [9, 9, 9]]}, [[5, 6, 7, 8, 9], [5, 6, 7, 8, 10, 11], [5, 6, 7, 8, 9, 9, 9]], [5, 6, 7, 8]),
]  # fmt: skip


@pytest.mark.parametrize(("body", "wholes", "prompt"), BODIES)
def test_log_likelihoods(
    body: dict[str, Any], wholes: list[list[int]], prompt: list[int], tmp_path: Path
) -> None:
    (work,) = works(tmp_path, body)
    found = answer(work)
    start = min(
        next((at for at, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
        for ids in wholes
    )
    assert start > 1
    assert [list(request.prompt) for request in work.requests] == wholes
    totals = []
    for one, ids in zip(found["choices"], wholes, strict=True):
        logprobs = scored(ids)[start - 1 :]
        totals.append(math.fsum(logprobs))
        assert (one["logprob"], one["tokens"]) == (totals[-1], len(ids) - start)
        assert one["logprob_per_token"] == totals[-1] / len(logprobs)
        nbytes = (
            len(one["text"].encode())
            if isinstance(one["text"], str)
            else len(b"".join(map(TEXT.token_bytes, one["text"])))
        )
        assert one["logprob_per_byte"] == totals[-1] / nbytes
    weights = [math.exp(total) for total in totals]
    for one, weight in zip(found["choices"], weights, strict=True):
        assert one["probability"] == pytest.approx(weight / sum(weights))
    assert found["answer"] == body["choices"][totals.index(max(totals))]
    for measure, best in found["best"].items():
        assert found["choices"][best][measure] == max(one[measure] for one in found["choices"])


def test_the_prompt_is_computed_once_and_the_batch_changes_nothing(tmp_path: Path) -> None:
    bodies = [{"prompt": f"{number} {PROMPT}", "choices": CHOICES} for number in range(3)]
    asked = [request for work in works(tmp_path, *bodies) for request in work.requests]
    world = start()
    alone = harness.run(world, CHAT, asked, max_num_seqs=1, prefix_sharing=False)
    together = harness.run(world, CHAT, asked)
    tight = harness.run(world, CHAT, asked, max_num_seqs=5, max_num_batched_tokens=24)
    assert alone.values == together.values == tight.values
    prompts = sum(len(request.prompt) for request in asked)
    assert alone.totals.prompt_tokens == prompts
    whole = sum(request.score_from for request in asked if request.choice == 0)
    rest = sum(len(request.prompt) - request.score_from for request in asked)
    more = len(asked) - 3  # of each choice but the first, the token before it
    assert together.totals.prompt_tokens == tight.totals.prompt_tokens == whole + rest + more
    # As much as scoring the prompts with an answer each, up to the tokens of the choices.
    plain = harness.run(world, CHAT, [request for request in asked if request.choice == 0])
    assert together.totals.prompt_tokens - plain.totals.prompt_tokens < rest + more


def test_a_choice_says_whether_its_tokens_are_the_likeliest(tmp_path: Path) -> None:
    prompt = [5, 6, 7, 8]
    (generated,) = run_engine(CHAT, [Request("greedy", tuple(prompt), max_tokens=3)])
    first, second, third = generated.tokens
    choices = [[first], [first, second, third], [first, second, third + 1], [first + 1, second]]
    plain, asked = works(
        tmp_path, *({"prompt": prompt, "choices": choices, "is_greedy": one} for one in (False, True))
    )
    said = answer(asked)["choices"]
    assert [one["is_greedy"] for one in said] == [True, True, False, False]
    assert [{**one, "is_greedy": None} for one in said] == [
        {**one, "is_greedy": None} for one in answer(plain)["choices"]
    ]
    assert "is_greedy" not in answer(plain)["choices"][0]
