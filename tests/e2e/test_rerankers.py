"""Qwen3-Reranker and its like in every form that is published, against the scores of the authors' code."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from mpillm import spec
from mpillm.batch.endpoints.pairs import INSTRUCTION
from mpillm.model.families import qwen
from mpillm.model.opening import config_of, open_source
from mpillm.planning.needs import around
from mpillm.text import load_tokenizer
from tests.conftest import ROOT
from tests.e2e.test_scoring import ONE, answers

RERANKER = ROOT / "tests/fixtures/reranker"
WORDS = {"classifier_from_token": ["no", "yes"]}
AS_VLLM = {"architectures": ["Qwen3ForSequenceClassification"], **WORDS, "is_original_qwen3_reranker": True}
ONE_LABEL = {
    "architectures": ["Qwen3ForSequenceClassification"],
    "id2label": {"0": "LABEL_0"},
    "pad_token_id": 0,
}


def reranker(folder: Path, config: dict[str, Any], rows: Any = None) -> Path:
    """The small Qwen3-Reranker with more in its configuration, and a classifier of these rows of its embeddings."""
    shutil.copytree(RERANKER, folder)
    old = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(old | config))
    if rows is not None:
        words = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tensors = load_file(folder / "model.safetensors")
        no, yes = (
            tensors["model.embed_tokens.weight"][words.token_to_id(word)].copy() for word in ("no", "yes")
        )
        save_file(tensors | {"score.weight": rows(no, yes)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "config", "rows", "job"),
    [
        ("Qwen3-Reranker-tiny", {}, None, {}),  # as published: nothing but its name says what it is
        ("model", {}, None, {"tokens": ["no", "yes"]}),
        ("model", WORDS, None, {}),
        ("model", AS_VLLM, None, {}),
        ("model", {**AS_VLLM, "is_original_qwen3_reranker": False, "method": "from_2_way_softmax"}, None, {}),
        ("seq-cls", ONE_LABEL, lambda no, yes: (yes - no)[None], {"template": "published"}),
        ("LogitScore", {}, None, {}),
    ],
)
def test_qwen3_rerankers(
    name: str, config: dict[str, Any], rows: Any, job: dict[str, Any], tmp_path: Path
) -> None:
    """The scores of the authors' code, in every form of the model; control tokens in texts are none of the template."""
    model = reranker(tmp_path / name, config, rows)
    pairs = json.loads((RERANKER / "golden.json").read_text())["pairs"]
    if name == "LogitScore":  # as Sentence Transformers has it
        words = Tokenizer.from_file(str(model / "tokenizer.json"))
        named = {"true_token_id": words.token_to_id("yes"), "false_token_id": words.token_to_id("no")}
        (model / "1_LogitScore").mkdir()
        (model / "1_LogitScore/config.json").write_text(json.dumps(named))
        kinds = [("", "transformer.Transformer"), ("1_LogitScore", "LogitScore")]
        modules = [{"idx": n, "path": path, "type": kind} for n, (path, kind) in enumerate(kinds)]
        (model / "modules.json").write_text(json.dumps(modules))
    if "template" in job:
        job = {"template": qwen.RERANKER}
    with closing(open_source(model)) as source:
        settings = [f"scoring.{key}={json.dumps(value)}" for key, value in job.items()]
        planned = spec.load(None, settings, model=str(model), input="in.jsonl", output="out")
        assert not around(planned, config_of(source), source).apart
    lines: list[dict[str, Any]] = [
        {"url": "/v1/score", "body": {"text_1": one["query"], "text_2": one["document"]}
         | ({"instruction": one["instruction"]} if one["instruction"] else {})}
        for one in pairs
    ]  # fmt: skip
    lines.append(
        {"query": pairs[0]["query"], "documents": [one["document"] for one in pairs[:3]] + ["<|im_end|>"]}
    )
    tables = {"scoring": job} if job else {}
    found = answers(
        model, tmp_path / "run", *lines, memory={"kv_type": "f32"}, wire={"activations": "f32"}, **tables
    )
    scored, ranked = found[:-1], found[-1]
    expected = [one["score"] for one in pairs]
    np.testing.assert_allclose([body["data"][0]["score"] for body in scored], expected, atol=2e-5)
    assert [body["usage"]["prompt_tokens"] for body in scored] == [len(one["ids"]) for one in pairs]
    by_index = {row["index"]: row["relevance_score"] for row in ranked["results"]}
    np.testing.assert_allclose([by_index[index] for index in range(3)], expected[:3], atol=2e-5)
    text = load_tokenizer(model)
    assert text is not None
    values = {"instruction": INSTRUCTION, "query": pairs[0]["query"], "document": "<|im_end|>"}
    ids = text.encode_template(qwen.RERANKER, values)
    assert ids.count(text.control["<|im_end|>"]) == 2
    assert ranked["usage"]["prompt_tokens"] == sum(len(one["ids"]) for one in pairs[:3]) + len(ids)


def test_pairs_that_are_formatted_already(tmp_path: Path) -> None:
    """As vLLM's example gives them to the converted model: the tokenizer puts them together, control tokens and all."""
    model = reranker(tmp_path / "seq-cls", ONE_LABEL, lambda no, yes: (yes - no)[None])
    pairs = json.loads((RERANKER / "golden.json").read_text())["pairs"]
    lines = []
    for one in pairs[:6]:
        text = qwen.RERANKER.format(**{**one, "instruction": INSTRUCTION})
        at = text.index("<Document>")
        lines.append({"url": "/v1/score", "body": {"queries": text[:at], "documents": text[at:]}})
    found = answers(model, tmp_path / "run", *lines, memory={"kv_type": "f32"}, wire={"activations": "f32"})
    np.testing.assert_allclose(
        [body["data"][0]["score"] for body in found], [one["score"] for one in pairs[:6]], atol=2e-5
    )
    cut = {"text_1": "<|im_start|>", "text_2": "<|im_end|>" * 9, "truncate_prompt_tokens": 5}
    (short,) = answers(model, tmp_path / "cut", {"url": "/v1/score", "body": cut})
    assert short["usage"]["prompt_tokens"] == 5


def test_one_word_that_answers(tmp_path: Path) -> None:
    """As bge-reranker-v2-gemma is configured for vLLM: the sigmoid of one token's logit."""
    one = {**AS_VLLM, "classifier_from_token": ["yes"], "is_original_qwen3_reranker": False}
    asked = [ONE, {**ONE, "use_activation": False}]
    scoring = {"template": "{query} {document}<|im_end|>"}
    models = [
        reranker(tmp_path / "words", {**one, "method": "no_post_processing"}),
        reranker(tmp_path / "rows", ONE_LABEL, lambda no, yes: yes[None]),
    ]
    (scored, raw), rows = (
        answers(model, tmp_path / f"{model.name} run", *asked, scoring=scoring) for model in models
    )
    logits = np.array([row["score"] for row in raw["data"]])
    np.testing.assert_allclose(
        [row["score"] for row in scored["data"]], 1 / (1 + np.exp(-logits)), rtol=1e-12
    )
    assert [body["data"] for body in rows] == [scored["data"], raw["data"]]
