"""lm-evaluation-harness asks the server, by its own code and HTTP: it gets the numbers of its `hf` in float32."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import requests
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from tests.conftest import clean_environment
from tests.job_helpers import TEXT
from tests.lm_eval.make_expected import HERE
from tests.serve.serving import serving

EXPECTED: dict[str, Any] = json.loads((HERE / "expected.json").read_text())
DOCUMENTS: list[dict[str, Any]] = [
    json.loads(line) for line in (HERE / "tiny.jsonl").read_text().splitlines()
]
BOS = 1


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("evaluated"), [sys.executable], clean_environment()) as (url, _):
        yield url


class Completions(LocalCompletionsAPI):  # type: ignore[misc]
    """`local-completions` with a tokenizer that needs no transformers."""

    def __init__(self, server: str, bos: bool) -> None:
        super().__init__(
            f"{server}/v1/completions",
            "none",
            model="chat",
            max_length=512,
            custom_prefix_token_id=BOS,
            eos_string="</s>",
        )
        self.tokenizer, self.tokenized_requests, self.add_bos_token = TEXT, True, bos

    def tok_encode(self, string: str | tuple[str, ...], **_: Any) -> Any:
        """Ids of a text, or of several."""
        if not isinstance(string, str):
            return [self.tok_encode(one) for one in string]
        return [BOS] * self.add_bos_token + TEXT.encode(string, add_special=False)


def asked(kind: str, *args: tuple[Any, ...]) -> list[Any]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(args)]


@pytest.mark.parametrize(("run", "bos"), [("served", False), ("served with BOS", True)])
def test_log_likelihoods_are_those_of_hf(server: str, run: str, bos: bool) -> None:
    """Also of an empty context, and of one that is longer than the model's."""
    harness = Completions(server, bos)
    expected = EXPECTED[run]
    pairs = [(one["question"], f" {choice}") for one in DOCUMENTS for choice in one["choices"]]
    found = harness.loglikelihood(asked("loglikelihood", *pairs))
    theirs = [answer for answers in expected["tiny_choice"]["answers"] for answer in answers]
    np.testing.assert_allclose([one for one, _ in found], [float(one) for one, _ in theirs], atol=1e-4)
    assert [str(greedy) for _, greedy in found] == [greedy for _, greedy in theirs]
    texts = [f"{one['question']} {one['choices'][0]} and {one['choices'][1]}" for one in DOCUMENTS]
    rolled = harness.loglikelihood_rolling(asked("loglikelihood_rolling", *((text,) for text in texts)))
    answers = [float(answer) for (answer,) in expected["tiny_rolling"]["answers"]]
    np.testing.assert_allclose(rolled, answers, rtol=1e-5)


UNTIL = {"until": ["e", "<|user|>", "\n\n"], "max_gen_toks": 20, "do_sample": False}


def test_generated_answers_are_those_of_hf_and_the_likeliest(server: str) -> None:
    harness = Completions(server, bos=False)
    prompts = [f"Say: {one['question']}" for one in DOCUMENTS]
    found = harness.generate_until(asked("generate_until", *((prompt, UNTIL) for prompt in prompts)))
    assert [[text] for text in found] == EXPECTED["served"]["tiny_generation"]["answers"]
    body = {"prompt": prompts[1], "max_tokens": 9, "temperature": 0, "return_token_ids": True}
    (choice,) = requests.post(harness.base_url, json=body, timeout=60).json()["choices"]
    context, ids = choice["prompt_token_ids"], choice["token_ids"]
    likeliest, other = harness._loglikelihood_tokens(
        [(None, context, ids), (None, context, [*ids[:-1], ids[-1] ^ 1])]
    )
    assert (likeliest[1], other[1]) == (True, False)


def test_chats_and_a_prompt_that_is_too_long(server: str, caplog: pytest.LogCaptureFixture) -> None:
    """The harness's log has the server's sentence; a key of the body has the prompt cut instead."""
    harness = LocalChatCompletion(
        f"{server}/v1/chat/completions", model="chat", max_retries=1, eos_string="</s>"
    )
    chats = [
        (harness.apply_chat_template([{"role": "user", "content": one["question"]}]), dict(UNTIL))
        for one in DOCUMENTS
        if one["question"]
    ]
    *short, (long, _) = chats
    answers = harness.generate_until(asked("generate_until", *short))
    assert len({*answers}) == len(short)
    with caplog.at_level(logging.WARNING), pytest.raises(requests.HTTPError):
        harness.generate_until(asked("generate_until", (long, dict(UNTIL))))
    assert "tokens and the model takes 512 tokens; shorten it" in caplog.text
    cut = {**UNTIL, "truncate_prompt_tokens": -1}
    assert harness.generate_until(asked("generate_until", (long, cut)))
