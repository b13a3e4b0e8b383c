"""Every key that OpenAI and vLLM document has its meaning, or is refused by a sentence; the documentation lists it."""

# ruff: noqa: E501 - a table of whole lines

from __future__ import annotations

import json
import re
import runpy
import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params

from mpillm.batch import answers
from mpillm.batch.endpoints import ENDPOINTS
from mpillm.batch.other_keys import IGNORED, NEUTRAL, REFUSED
from mpillm.batch.work import TOO_LONG, Model, Work
from mpillm.errors import RequestError
from mpillm.model.embedding import EmbeddingSettings
from mpillm.model.pooled import Classifier, Dense
from mpillm.serve.prepare import prepare
from mpillm.text import load_tokenizer
from tests.batch.test_answers import answer
from tests.batch.test_tools import NOW, TEMPLATE, WEATHER, with_template
from tests.conftest import ROOT
from tests.job_helpers import END, TEXT, WITH_TEXT, completion, errors, job, works

CHAT, COMPLETIONS, EMBEDDINGS, CHOICES, SCORE, RERANK, CLASSIFY = (endpoint.url for endpoint in ENDPOINTS)
TYPES = {endpoint.url: endpoint for endpoint in ENDPOINTS}

# The fields of vLLM's classes of requests (main branch in autumn 2026, and those of 0.6 to 0.10 that are gone since).
SAMPLED = [
    "model",
    "frequency_penalty",
    "logit_bias",
    "max_tokens",
    "n",
    "presence_penalty",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "user",
    "best_of",
    "use_beam_search",
    "top_k",
    "min_p",
    "repetition_penalty",
    "watermarking",
    "length_penalty",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "truncate_prompt_tokens",
    "truncation_side",
    "prompt_logprobs",
    "logprob_token_ids",
    "allowed_token_ids",
    "bad_words",
    "echo",
    "add_special_tokens",
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "priority",
    "request_id",
    "session_id",
    "logits_processors",
    "return_tokens_as_token_ids",
    "return_token_ids",
    "routed_experts_prompt_start",
    "return_token_offsets",
    "return_mm_kwargs",
    "cache_salt",
    "kv_transfer_params",
    "ec_transfer_params",
    "vllm_xargs",
    "repetition_detection",
    "thinking_token_budget",
    "stream_interval",
    "logprobs",
]
POOLED = [
    "model",
    "user",
    "truncate_prompt_tokens",
    "padding",
    "truncation_side",
    "request_id",
    "priority",
    "mm_processor_kwargs",
    "cache_salt",
]
VLLM = {
    CHAT: [*SAMPLED, *["messages", "top_logprobs", "max_completion_tokens", "tools", "tool_choice", "reasoning_effort", "include_reasoning", "parallel_tool_calls", "add_generation_prompt", "continue_final_message", "documents", "chat_template", "chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs", "return_prompt_text"]],
    COMPLETIONS: [*SAMPLED, *["prompt", "suffix", "prompt_embeds"]],
    EMBEDDINGS: [*POOLED, *["input", "messages", "add_special_tokens", "encoding_format", "dimensions", "embed_dtype", "endianness", "normalize", "use_activation", "chat_template", "media_io_kwargs"]],
    SCORE: [*POOLED, *["text_1", "text_2", "queries", "documents", "items", "data_1", "data_2", "activation", "use_activation"]],
    RERANK: [*POOLED, *["query", "documents", "top_n", "activation", "use_activation", "max_tokens_per_doc"]],
    CLASSIFY: [*POOLED, *["input", "messages", "add_special_tokens", "activation", "use_activation", "chat_template"]],
}  # fmt: skip
OPENAI: dict[str, Any] = {
    CHAT: chat_create_params.CompletionCreateParamsBase,
    COMPLETIONS: completion_create_params.CompletionCreateParamsBase,
    EMBEDDINGS: embedding_create_params.EmbeddingCreateParams,
}
LEAST: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "the fox"}]},
    COMPLETIONS: {"prompt": "the fox"},
    EMBEDDINGS: {"input": "the fox"},
    CHOICES: {"prompt": "the", "choices": [" fox", " dog"]},
    SCORE: {"text_1": "the fox", "text_2": "a ship"},
    RERANK: {"query": "the fox", "documents": ["a ship", "the fox"]},
    CLASSIFY: {"input": "the fox"},
}
DOCUMENTED = [
    (url, key)
    for url in VLLM
    for key in sorted({*VLLM[url], *typing.get_type_hints(OPENAI[url])} if url in OPENAI else VLLM[url])
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Of a template that reads all that chats may give it, a tokenizer that begins with BOS, a prompt for embeddings."""
    folder = tmp_path_factory.mktemp("fields") / "model"
    with_template(
        folder, "{% for d in documents or [] %}[{{ d.title }}: {{ d.text }}]{% endfor %}" + TEMPLATE
    )
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokens = {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}}
    first, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text],
        "special_tokens": tokens,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": processor}))
    embedding = EmbeddingSettings(prompts={"query": "find "})
    return replace(WITH_TEXT, text=load_tokenizer(folder), hidden=8, embedding=embedding)


def classifying(model: Model, labels: int) -> Model:
    weight = np.arange(8 * labels, dtype=np.float32).reshape(labels, 8) / 8 - 1
    layer = Dense(weight)
    decision: Any = "sigmoid" if labels == 1 else "softmax"
    named = tuple(f"L{index}" for index in range(labels))
    return replace(model, classifier=Classifier("mean", (layer,), named, decision))


def test_every_documented_key_is_taken_or_refused_by_name(model: Model, tmp_path: Path) -> None:
    """And null asks for nothing."""
    left = [(url, key) for url, key in DOCUMENTED if key not in TYPES[url].__struct_fields__]
    lines = [{"url": url, "body": {**LEAST[url], key: {"x": 1}}} for url, key in left]
    for (_, key), said in zip(left, errors(tmp_path, *lines, model=classifying(model, 1)), strict=True):
        assert (said is None) == (key in ("metadata", "prompt_cache_options")), (key, said)
        refused = rf'Line \d+: {key}(: expected .+, got an object|: object missing .+|( {{"x":1}})? is not supported)'
        assert said is None or re.match(refused, said) or key in IGNORED, said
    nulls = [{"url": url, "body": {**LEAST[url], key: None}} for url, key in left]
    assert not any(errors(tmp_path, *nulls, model=classifying(model, 1)))
    neutral = [
        {"url": COMPLETIONS, "body": {**LEAST[COMPLETIONS], key: value}}
        for key, values in NEUTRAL.items() if key not in TYPES[COMPLETIONS].__struct_fields__ for value in values
    ]  # fmt: skip
    assert not any(errors(tmp_path, *neutral, model=model))


def test_what_changes_no_answer_is_looked_at(tmp_path: Path) -> None:
    right = [
        ("user", "a"), ("metadata", {"a": 1}), ("store", True), ("service_tier", "flex"), ("priority", 3), ("priority", 3.0),
        ("prompt_cache_retention", "24h"), ("prediction", {"type": "content", "content": "a"}),
        ("prediction", {"type": "content", "content": [{"type": "text", "text": "a"}]}), ("stream_interval", 2),
        ("stream_options", {"include_usage": True, "include_obfuscation": False}),
    ]  # fmt: skip
    wrong = [
        ("user", 3, "user: expected a string or null, got a whole number"),
        ("store", "yes", "store: expected true or false"),
        ("metadata", ["a"], "metadata: expected an object"),
        ("service_tier", "best", "service_tier: expected one of 'auto', 'default', 'fast', 'flex', 'priority', 'scale', not 'best'"),
        ("prompt_cache_retention", 24, "prompt_cache_retention: expected a string"),
        ("prediction", "a", "prediction: expected an object"),
        ("prediction", {"type": "content"}, "the key 'content' is missing in prediction"),
        ("prediction", {"type": "image", "content": "a"}, "prediction.type: expected one of 'content', not 'image'"),
        ("stream_interval", 0, "stream_interval: expected a whole number >= 1"),
        ("stream_options", {"include_usage": "yes"}, "stream_options.include_usage: expected true or false"),
        ("stream_options", {"continuous_usage_stats": True}, "stream_options: continuous_usage_stats true is not supported"),
        ("stream_options", {"usage": True}, "the key 'stream_options.usage' is unknown"),
        ("return_token_offsets", True, "return_token_offsets true is not supported"),
    ]  # fmt: skip
    lines = [{"prompt": "a", key: value} for key, value, *_ in [*right, *wrong]]
    found = errors(tmp_path, *lines)
    assert found[: len(right)] == [None] * len(right)
    for error, (_, _, said) in zip(found[len(right) :], wrong, strict=True):
        assert said in str(error), (error, said)


def test_the_page_lists_every_key() -> None:
    whole = (ROOT / "docs/requests.md").read_text()
    written = runpy.run_path(str(ROOT / "packaging/docs/other_keys.py"))
    assert whole.endswith(f"{written['HEADING']}\n{written['section']()}"), "run packaging/docs/other_keys.py"
    page = re.sub(r"^```.*?^```", "", whole, flags=re.M | re.S)
    listed = {word for code in re.findall(r"`([^`]+)`", page) for word in re.findall(r"\w+", code)}
    taken = {key for endpoint in ENDPOINTS for key in endpoint.__struct_fields__}
    assert not (taken | IGNORED | NEUTRAL.keys() | REFUSED | {key for _, key in DOCUMENTED}) - listed


BOS = TEXT.encode("<s>", False, parse_special=True)[0]


class Asked:
    """What a body and the same one without a key ask for, and what they are answered."""

    def __init__(self, url: str, body: dict[str, Any], key: str, model: Model, folder: Path) -> None:
        minimum = LEAST[url]
        without = {name: value for name, value in body.items() if name != key and url not in (SCORE, CHOICES)}
        lines = [{"url": url, "body": minimum | more} for more in (body, without)]
        self.model = model
        self.work: Work
        self.work, self.without = works(folder, *lines, model=model)

    @property
    def request(self) -> Any:
        return self.work.requests[0]

    def text(self, which: int = 0) -> str:
        """The prompt."""
        return TEXT.decode(self.work.requests[which].prompt, skip_special=False)

    def shown(self, text: str = "the quick fox", without: bool = False, **more: Any) -> Any:
        """The answer with these generated tokens, and an end token."""
        ids = [*TEXT.encode(text, False, parse_special=True), END]
        work = self.without if without else self.work
        more = {"finish_reason": "stop", "stop_id": END} | more
        body = answer(work, [ids for _ in work.requests], self.model, **more)
        return body

    def obeys(self, text: str) -> bool:
        """Whether an answer may be this text."""
        matcher = self.request.constraint()
        for token in TEXT.encode(text, False):
            if not matcher.accepts(token):
                return False
            matcher.push(token)
        return bool(matcher.accepts(END) or matcher.ended)

    def choice(self, *args: Any, **more: Any) -> Any:
        return self.shown(*args, **more)["choices"][0]

    def pooled(self, without: bool = False) -> Any:
        """The answer of an endpoint that pools."""
        work = self.without if without else self.work
        found = [completion(request, [], seed) for seed, request in enumerate(work.requests)]
        return json.loads(answers.result_line(work, found, self.model))["response"]["body"]


Check = Callable[[Asked], object]
NUMBERS = {"temperature": 0.7, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": -0.5, "seed": -4, "min_tokens": 3, "max_tokens": 9, "prompt_logprobs": 2}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
LONG = "the quick brown fox jumps over the lazy dog and the ship sails the sea"
SAID = [{"role": "user", "content": LONG}]
GENERATED: dict[str, tuple[dict[str, Any], Check]] = {
    **{key: ({key: value}, lambda a, key=key, value=value: getattr(a.request, key) == value) for key, value in NUMBERS.items()},  # type: ignore[misc]
    "model": ({"model": "any"}, lambda a: a.request.adapter == 0),
    "logit_bias": ({"logit_bias": {"5": 200, "6": -1}}, lambda a: a.request.logit_bias == ((5, 100.0), (6, -1.0))),
    "allowed_token_ids": ({"allowed_token_ids": [5, 40]}, lambda a: np.flatnonzero(np.unpackbits(np.frombuffer(np.asarray(a.request.allowed).tobytes(), np.uint8), bitorder="little")).tolist() == [5, 40]),
    "bad_words": ({"bad_words": ["fox"]}, lambda a: tuple(TEXT.encode("fox", False)) in a.request.bad_words),
    "stop_token_ids": ({"stop_token_ids": [7]}, lambda a: a.request.stop_ids == {7, END}),
    "ignore_eos": ({"ignore_eos": True}, lambda a: not a.request.stop_ids),
    "n": ({"n": 3}, lambda a: [one.choice for one in a.work.requests] == [0, 1, 2]),
    "stop": ({"stop": " fox"}, lambda a: any(map(a.request.watch, TEXT.encode("the quick fox", False)))),
    "include_stop_str_in_output": ({"stop": " fox", "include_stop_str_in_output": True}, lambda a: "quick fox" in str(a.choice(stop_id=None)) and "quick fox" not in str(a.choice(stop_id=None, without=True))),
    "skip_special_tokens": ({"skip_special_tokens": False}, lambda a: "<|user|>" in str(a.choice("a<|user|>b")) and "<|user|>" not in str(a.choice("a<|user|>b", without=True))),
    "response_format": ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, lambda a: a.obeys('{"a": 3}') and not a.obeys('{"a": "3"}')),
    "structured_outputs": ({"structured_outputs": {"choice": ["yes", "no"]}}, lambda a: a.obeys("yes") and not a.obeys("yesno")),
    "guided_json": ({"guided_json": json.dumps(SCHEMA)}, lambda a: a.obeys('{"a": 3}') and not a.obeys("3")),
    "guided_regex": ({"guided_regex": "[ab]+"}, lambda a: a.obeys("abba") and not a.obeys("abc")),
    "guided_choice": ({"guided_choice": ["yes", "no"]}, lambda a: a.obeys("no") and not a.obeys("not")),
    "guided_grammar": ({"guided_grammar": 'root ::= "a" root | "b"'}, lambda a: a.obeys("aab") and not a.obeys("aa")),
    "return_token_ids": ({"return_token_ids": True}, lambda a: a.choice()["prompt_token_ids"] == list(a.request.prompt)),
    "return_tokens_as_token_ids": ({"return_tokens_as_token_ids": True}, lambda a: f"token_id:{END}" in json.dumps(a.choice())),
}  # fmt: skip
MEANINGS: dict[str, dict[str, tuple[dict[str, Any], Check]]] = {
    CHAT: GENERATED | {
        "add_special_tokens": ({"add_special_tokens": True}, lambda a: a.request.prompt == (BOS, *a.without.requests[0].prompt)),
        "truncate_prompt_tokens": ({"truncate_prompt_tokens": 6, "messages": SAID}, lambda a: a.request.prompt == a.without.requests[0].prompt[-6:]),
        "truncation_side": ({"truncate_prompt_tokens": 6, "truncation_side": "right", "messages": SAID}, lambda a: len(a.request.prompt) == 6 and a.text().startswith("<|user|>")),
        "messages": ({"messages": SAID}, lambda a: LONG in a.text()),
        "max_completion_tokens": ({"max_completion_tokens": 5, "max_tokens": 9}, lambda a: a.request.max_tokens == 5),
        "logprobs": ({"logprobs": True}, lambda a: len(a.choice()["logprobs"]["content"]) and a.choice(without=True)["logprobs"] is None),
        "top_logprobs": ({"logprobs": True, "top_logprobs": 3}, lambda a: len(a.choice()["logprobs"]["content"][0]["top_logprobs"]) == 3),
        "return_tokens_as_token_ids": ({"logprobs": True, "return_tokens_as_token_ids": True}, GENERATED["return_tokens_as_token_ids"][1]),
        "chat_template_kwargs": ({"chat_template_kwargs": {"enable_thinking": False}}, lambda a: a.text().endswith("<think>\n\n</think>")),
        "reasoning_effort": ({"reasoning_effort": "none"}, lambda a: a.text().endswith("<think>\n\n</think>")),
        "add_generation_prompt": ({"add_generation_prompt": False}, lambda a: not a.text().endswith("<|assistant|>")),
        "continue_final_message": ({"continue_final_message": True, "messages": [{"role": "assistant", "content": "so it"}]}, lambda a: a.text().endswith("so it")),
        "echo": ({"echo": True, "messages": [{"role": "assistant", "content": "so it"}]}, lambda a: a.choice()["message"]["content"] == "so itthe quick fox"),
        "documents": ({"documents": [{"title": "Fox", "text": "An animal."}, {"title": "Ship", "text": "</s>"}]}, lambda a: "[Fox: An animal.][Ship: </s>]" in a.text() and list(a.request.prompt).count(END) == list(a.without.requests[0].prompt).count(END)),
        "include_reasoning": ({"include_reasoning": False}, lambda a: "reasoning" not in a.choice("<think>so</think>yes")["message"] and a.choice("<think>so</think>yes", without=True)["message"]["reasoning"] == "so"),
        "tools": ({"tools": [WEATHER]}, lambda a: "weather" in a.text()),
        "tool_choice": ({"tools": [NOW], "tool_choice": "required"}, lambda a: a.obeys('<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>') and not a.obeys("now")),
        "parallel_tool_calls": ({"tools": [NOW], "parallel_tool_calls": False}, lambda a: [len(a.choice(2 * '<tool_call>{"name": "now", "arguments": {}}</tool_call>', without=w)["message"]["tool_calls"]) for w in (False, True)] == [1, 2]),
    },
    COMPLETIONS: GENERATED | {
        "add_special_tokens": ({"add_special_tokens": False}, lambda a: list(a.request.prompt) == TEXT.encode("the fox", False) == list(a.without.requests[0].prompt)[1:]),
        "truncate_prompt_tokens": ({"truncate_prompt_tokens": 6, "prompt": LONG}, lambda a: list(a.request.prompt) == [BOS, *TEXT.encode(LONG)[-5:]]),
        "truncation_side": ({"truncate_prompt_tokens": 6, "truncation_side": "right", "prompt": LONG}, lambda a: list(a.request.prompt) == [BOS, *TEXT.encode(LONG)[:5]]),
        "prompt": ({"prompt": ["the fox", "a ship"]}, lambda a: len(a.work.requests) == 2),
        "logprobs": ({"logprobs": 2}, lambda a: len(a.choice()["logprobs"]["top_logprobs"][0]) in (2, 3)),
        "return_tokens_as_token_ids": ({"logprobs": 1, "return_tokens_as_token_ids": True}, GENERATED["return_tokens_as_token_ids"][1]),
        "echo": ({"echo": True}, lambda a: a.choice()["text"].startswith("the fox")),
        "best_of": ({"best_of": 3}, lambda a: len(a.work.requests) == 3 and len(a.shown()["choices"]) == 1),
    },
    EMBEDDINGS: {
        "model": ({"model": "any"}, lambda a: a.request.kind == "embed"),
        "input": ({"input": [[5, 6], [7]]}, lambda a: [one.prompt for one in a.work.requests] == [(5, 6), (7,)]),
        "encoding_format": ({"encoding_format": "base64"}, lambda a: isinstance(a.pooled()["data"][0]["embedding"], str)),
        "pooling": ({"pooling": "last"}, lambda a: a.request.pooling == "last" != a.without.requests[0].pooling),
        "normalize": ({"normalize": False}, lambda a: _length(a.pooled()) != pytest.approx(1) == _length(a.pooled(without=True))),
        "use_activation": ({"use_activation": False}, lambda a: _length(a.pooled()) != pytest.approx(1) == _length(a.pooled(without=True))),
        "dimensions": ({"dimensions": 3}, lambda a: len(a.pooled()["data"][0]["embedding"]) == 3 and _length(a.pooled()) == pytest.approx(1)),
        "prompt_name": ({"prompt_name": "query"}, lambda a: list(a.request.prompt) == [BOS, *TEXT.encode("find the fox")]),
        "add_special_tokens": ({"add_special_tokens": False}, lambda a: list(a.request.prompt) == TEXT.encode("the fox", False) == list(a.without.requests[0].prompt)[1:]),
        "truncate_prompt_tokens": ({"truncate_prompt_tokens": 6, "input": LONG}, lambda a: list(a.request.prompt) == [BOS, *TEXT.encode(LONG)[:5]]),
        "truncation_side": ({"truncate_prompt_tokens": 6, "input": LONG, "truncation_side": "left", "add_special_tokens": False}, lambda a: list(a.request.prompt) == TEXT.encode(LONG, False)[-6:]),
    },
    CHOICES: {
        "model": ({"model": "any"}, lambda a: a.request.max_tokens == 0),
        "prompt": ({"prompt": [5, 6]}, lambda a: a.request.prompt[:2] == (5, 6)),
        "messages": ({"prompt": None, "messages": LEAST[CHAT]["messages"]}, lambda a: a.text().endswith("<|assistant|> fox")),
        "choices": ({"choices": [" a", " b", " c"]}, lambda a: len(a.work.requests) == 3),
        "add_special_tokens": ({"add_special_tokens": False}, lambda a: (BOS, *a.request.prompt) == a.without.requests[0].prompt),
        "chat_template_kwargs": ({"prompt": None, "messages": LEAST[CHAT]["messages"], "chat_template_kwargs": {"enable_thinking": True}}, lambda a: a.text().endswith("<think> fox")),
        "is_greedy": ({"is_greedy": True}, lambda a: a.request.prompt_logprobs == 1),
    },
    SCORE: {
        "model": ({"model": "any"}, lambda a: len(a.pooled()["data"]) == 1),
        **{key: ({"text_1": None, "text_2": None, one: ["the fox"], two: ["a ship", "the fox"]}, lambda a: [len(a.work.requests), len(a.pooled()["data"])] == [2, 2]) for one, two in (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")) for key in (one, two)},
    },
    RERANK: {
        "model": ({"model": "any"}, lambda a: len(a.pooled()["results"]) == 2),
        "query": ({"query": "a ship"}, lambda a: "a ship" in a.text()),
        "documents": ({"documents": [{"text": "a ship"}, "b", "c"]}, lambda a: "a ship" in a.text() and len(a.work.requests) == 3),
        "top_n": ({"top_n": 1}, lambda a: len(a.pooled()["results"]) == 1),
        "return_documents": ({"return_documents": False}, lambda a: "document" not in a.pooled()["results"][0]),
    },
    CLASSIFY: {
        "model": ({"model": "any"}, lambda a: a.pooled()["data"][0]["label"] in ("L0", "L1", "L2")),
        "input": ({"input": ["the fox", "a ship"]}, lambda a: len(a.pooled()["data"]) == 2),
        "add_special_tokens": ({"add_special_tokens": False}, lambda a: list(a.request.prompt) == TEXT.encode("the fox", False) == list(a.without.requests[0].prompt)[1:]),
        "truncate_prompt_tokens": ({"truncate_prompt_tokens": 6, "input": LONG}, lambda a: len(a.request.prompt) == 6),
        "truncation_side": ({"truncate_prompt_tokens": 6, "input": LONG, "truncation_side": "left", "add_special_tokens": False}, lambda a: list(a.request.prompt) == TEXT.encode(LONG, False)[-6:]),
        **{key: ({key: False}, lambda a: sum(a.pooled()["data"][0]["probs"]) != pytest.approx(1) == sum(a.pooled(without=True)["data"][0]["probs"])) for key in ("activation", "use_activation")},
    },
}  # fmt: skip
for url in (SCORE, RERANK):
    MEANINGS[url] |= {
        "instruction": ({"instruction": "find animals"}, lambda a: "find animals" in a.text()),
        "truncate_prompt_tokens": ({"truncate_prompt_tokens": 20, "instruction": "a", **({"text_2": LONG} if url == SCORE else {"documents": [LONG]})}, lambda a: 0 < len(a.request.prompt) <= 20),
        "truncation_side": ({"truncation_side": "right"}, lambda a: a.request.prompt == a.without.requests[0].prompt),
        **{key: ({key: False}, lambda a: a.pooled() != a.pooled(without=True)) for key in ("activation", "use_activation")},
    }  # fmt: skip


def _length(body: Any) -> float:
    return float(np.linalg.norm(body["data"][0]["embedding"]))


def test_each_key_is_in_the_table() -> None:
    assert {url: set(TYPES[url].__struct_fields__) for url in TYPES} == {
        url: set(table) for url, table in MEANINGS.items()
    }


@pytest.mark.parametrize("url", TYPES)
def test_each_key_has_its_meaning(url: str, model: Model, tmp_path: Path) -> None:
    labels = {SCORE: 1, RERANK: 1, CLASSIFY: 3}.get(url)
    used = model if labels is None else classifying(model, labels)
    if url in (SCORE, RERANK):
        used = replace(used, pair_template="{instruction}\n{query}\n{document}\n")
    table = MEANINGS[url].items()
    assert not [key for key, (body, check) in table if not check(Asked(url, body, key, used, tmp_path))]


WRONG: list[Any] = [
    *[True, 0, -1, -2.5, 10**9, 1e300, "", "x", "(", "a" * 5000, [], [[]], [-1], [10**9], {}, {"a": 1}, {"999999": 1.0}],
    *[[{"role": "user", "content": 5}], {"type": "json_schema"}, {"json": {"type": "x"}}, {"regex": "("}],
]  # fmt: skip
OF_TWO = ("the line needs ", "the pair has ", "the prompt with choices")  # sentences on several keys together


@pytest.mark.parametrize("url", TYPES)
def test_what_is_refused_is_named_by_its_key(url: str, model: Model, tmp_path: Path) -> None:
    """OpenAI's `param`."""
    labels = {SCORE: 1, RERANK: 1, CLASSIFY: 3}.get(url)
    used = model if labels is None else classifying(model, labels)
    used = replace(used, pair_template="{instruction}\n{query}\n{document}\n")
    made, named, misnamed = job(tmp_path), set(), []
    for key in (*TYPES[url].__struct_fields__, *REFUSED, *IGNORED, "unheard_of"):
        for value in WRONG:
            body = {**LEAST[url], "max_tokens": 1} if url in (CHAT, COMPLETIONS) else LEAST[url]
            try:
                prepare(url, {**body, key: value}, made, used)
            except RequestError as error:
                if error.code != TOO_LONG and not str(error).startswith(OF_TWO):
                    named.add(key)
                    if not str(error.param).startswith(key):
                        misnamed.append((key, value, error.param, str(error)))
    assert misnamed == []
    assert len(named) > 30, "or nothing was refused"


YES, NO = ({"type": "const_string", "value": text} for text in ("yes", "no"))
THOUGHT = {"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": "</t>"}
TAGGED = {
    "type": "triggered_tags",
    "triggers": ["<f="],
    "tags": [
        {
            "type": "tag",
            "begin": "<f=add>",
            "content": {"type": "json_schema", "json_schema": SCHEMA},
            "end": "</f>",
        },
        {"type": "tag", "begin": "<f=now>", "content": {"type": "any_text"}, "end": "</f>"},
    ],
}


def test_structural_tags(tmp_path: Path) -> None:
    tags = {
        "type": "structural_tag",
        "structures": [
            {"begin": "<f=add>", "schema": SCHEMA, "end": "</f>"},
            {"begin": "<f=now>", "schema": {"type": "null"}, "end": "</f>"},
        ],
        "triggers": ["<f="],
    }
    for body in (
        {"response_format": tags},
        {"structured_outputs": {"structural_tag": tags}},
        {"structured_outputs": {"structural_tag": json.dumps(tags)}},
    ):
        asked = Asked(COMPLETIONS, body, "", WITH_TEXT, tmp_path)
        assert all(map(asked.obeys, ["", "a <b>", 'so <f=add>{"a": 3}</f> and <f=now>null</f>.']))
        assert not any(map(asked.obeys, ["<f=", "<f=sub>", '<f=add>{"a": 3}', "<f=now>3</f>"]))


@pytest.mark.parametrize(
    ("format", "right", "wrong"),
    [
        ({"type": "const_string", "value": "so."}, ["so."], ["", "so"]),
        ({"type": "json_schema", "json_schema": SCHEMA}, ['{"a": 3}'], ["{}", '{"a": 3} ']),
        ({"type": "regex", "pattern": "[a-c]{2}-[0-9]"}, ["ab-3"], ["ad-3", "ab-"]),
        ({"type": "grammar", "grammar": 'root ::= ("yes" | "no")'}, ["yes", "no"], ["yesno", ""]),
        ({"type": "any_text"}, ["", "a <b>"], []),
        ({"type": "or", "elements": [YES, NO]}, ["yes", "no"], ["", "yesno"]),
        ({"type": "sequence", "elements": [YES, {"type": "optional", "content": NO}, {"type": "any_text"}]}, ["yes", "yesno", "yes, b"], ["no"]),
        ({"type": "sequence", "elements": [{"type": "plus", "content": YES}, {"type": "star", "content": NO}]}, ["yes", "yesyesno", "yesnono"], ["", "no"]),
        ({"type": "repeat", "min": 1, "max": 2, "content": NO}, ["no", "nono"], ["", "nonono"]),
        ({"type": "repeat", "min": 2, "max": -1, "content": NO}, ["nono", "nononono"], ["no"]),
        ({**THOUGHT, "end": ["</t>", "."]}, ["<t>a b</t>", "<t>."], ["<t>a", "a</t>", "<t></t> "]),
        ({"type": "sequence", "elements": [THOUGHT, YES]}, ["<t>no</t>yes"], ["yes", "<t>yes"]),
        (TAGGED, ["", "a <b>", 'so <f=add>{"a": 3}</f> and <f=now>a</f>.'], ["<f=", "<f=sub>", '<f=add>{"a": 3}', "<f=add>3</f>"]),
        ({**TAGGED, "at_least_one": True}, ['<f=add>{"a": 3}</f> and'], ["", 'so <f=add>{"a": 3}</f>']),
        ({**TAGGED, "at_least_one": True, "stop_after_first": True}, ['<f=add>{"a": 3}</f>'], ['<f=add>{"a": 3}</f> and']),
        ({**TAGGED, "stop_after_first": True}, ['so <f=add>{"a": 3}</f>', "so"], ['so <f=add>{"a": 3}</f> and']),
        ({"type": "tags_with_separator", "tags": [THOUGHT], "separator": ", "}, ["", "<t>a</t>, <t>b</t>"], ["a", "<t>a</t>, "]),
        ({"type": "tags_with_separator", "tags": [THOUGHT], "separator": ", ", "at_least_one": True, "stop_after_first": True}, ["<t>a</t>"], ["", "<t>a</t>, <t>b</t>"]),
    ],
)  # fmt: skip
def test_formats_of_structural_tags(format: Any, right: list[str], wrong: list[str], tmp_path: Path) -> None:
    tags = {"type": "structural_tag", "format": format}
    for body in ({"response_format": tags}, {"structured_outputs": {"structural_tag": json.dumps(tags)}}):
        asked = Asked(COMPLETIONS, body, "", WITH_TEXT, tmp_path)
        assert [text for text in right if not asked.obeys(text)] == []
        assert [text for text in wrong if asked.obeys(text)] == []


def test_structural_tags_that_are_wrong(tmp_path: Path) -> None:
    deep: Any = YES
    for _ in range(40):
        deep = {"type": "optional", "content": deep}
    formats = {
        "format: object missing required field type": {"value": "a"},
        "format.type: invalid value 'token'": {"type": "token", "token": 3},
        "format: object contains unknown field a": {**YES, "a": 1},
        "format.style": {"type": "json_schema", "json_schema": {}, "style": "qwen_xml"},
        "format.max_tokens": {"type": "any_text", "max_tokens": 3},
        "any_text must come last, or be the only content of a tag": {"type": "sequence", "elements": [{"type": "any_text"}, YES]},
        "triggered_tags must come last, or be the only content of a tag": {"type": "plus", "content": TAGGED},
        "repeat has a min of 3 and a max of 2": {"type": "repeat", "min": 3, "max": 2, "content": YES},
        "tag 1 begins with none of the triggers": {**TAGGED, "triggers": ["<g="]},
        "no tag begins with the trigger '<g='": {**TAGGED, "triggers": ["<f=", "<g="]},
        "there are formats in more than 32 others": deep,
    }  # fmt: skip
    bodies = [
        {"prompt": "a", "response_format": {"type": "structural_tag", "format": one}}
        for one in formats.values()
    ]
    both = {"type": "structural_tag", "format": YES, "triggers": ["a"]}
    *said, last = errors(tmp_path, *bodies, {"prompt": "a", "response_format": both})
    for found, expected in zip(said, formats, strict=True):
        assert expected in found
    assert "give either format, or structures and triggers" in last


def test_values_that_ask_for_nothing_stand_beside_others(model: Model, tmp_path: Path) -> None:
    free = {
        "response_format": {"type": "text"},
        "structured_outputs": {"json_object": False, "choice": ["yes"]},
    }
    assert Asked(COMPLETIONS, free, "", WITH_TEXT, tmp_path).obeys("yes")
    assert not Asked(COMPLETIONS, free, "", WITH_TEXT, tmp_path).obeys("no")
    overrides = ("sampling.structured_outputs.choice=['yes']",)
    (work,) = works(tmp_path, {"prompt": "a", "response_format": {"type": "text"}}, overrides=overrides)
    assert work.requests[0].constraint is None
    one = Asked(RERANK, {"documents": "a ship"}, "", classifying(model, 1), tmp_path)
    assert [item["document"]["text"] for item in one.pooled()["results"]] == ["a ship"]


def test_options_of_schemas(tmp_path: Path) -> None:
    nested = {"type": "object", "properties": {"properties": SCHEMA}, "required": ["properties"]}
    found = [
        Asked(COMPLETIONS, {"structured_outputs": {"json": nested, **options}}, "", WITH_TEXT, tmp_path)
        for options in ({}, {"disable_additional_properties": True}, {"whitespace_pattern": "_?"}, {"disable_any_whitespace": True})
    ]  # fmt: skip
    texts = [
        '{"properties": {"a": 3}}',
        '{"properties":{"a":3,"b":4}}',
        '{"properties":_{"a":3}}',
        '{"properties":{"a":3}}',
    ]
    assert [[asked.obeys(text) for text in texts] for asked in found] == [
        [True, True, False, True],
        [True, False, False, True],
        [False, True, True, True],
        [False, True, False, True],
    ]
