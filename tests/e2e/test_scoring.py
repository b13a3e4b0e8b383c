"""/v1/score, /v1/rerank and /v1/classify from the files of models to the answers, in the shapes that vLLM documents."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from openai.types import CreateEmbeddingResponse
from openai.types.chat import ChatCompletion
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mpillm.engine.pooled import logits_of
from mpillm.engine.request import Request
from tests.conftest import clean_environment, run_bounded
from tests.job_helpers import CHAT
from tests.model.engine_harness import run_engine
from tests.model.pooled import FOLDER, classifier_of

QUERY, DOCUMENTS = "the fox", ["the quick brown fox", "a ship that sails the sea", "the fox </s>"]
ONE = {"text_1": QUERY, "text_2": DOCUMENTS}


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """A run of the command line."""
    return run_bounded([sys.executable, "-m", "mpillm", "run", *words], env=clean_environment())


def answers(model: Path, folder: Path, *lines: dict[str, Any], **job: Any) -> list[dict[str, Any]]:
    """The bodies of a run's answers; `job` has tables of the job file."""
    folder.mkdir(exist_ok=True)
    (folder / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    tables = "".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
        for name, table in job.items()
    )
    (folder / "job.toml").write_text(
        f'model = "{model}"\ninput = "{folder}/in.jsonl"\noutput = "{folder}/out"\n{tables}'
    )
    done = run(folder / "job.toml")
    assert done.returncode in (0, 1), done.stderr
    read = (folder / "out/results.jsonl").read_text().splitlines()
    return [json.loads(line)["response"]["body"] for line in read]


def classifier(folder: Path, labels: dict[str, str], **config: Any) -> Path:
    """The small chat model with a classifier instead of its LM head."""
    shutil.copytree(CHAT, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    hidden = tensors["model.embed_tokens.weight"].shape[1]
    tensors["score.weight"] = (
        np.random.default_rng(3).standard_normal((len(labels), hidden)).astype(np.float32)
    )
    save_file(tensors, folder / "model.safetensors")
    old = json.loads((folder / "config.json").read_text())
    named = old["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
    new = {**old, "architectures": [named], "id2label": labels, **config}
    (folder / "config.json").write_text(json.dumps(new))
    return folder


def test_a_classifier_with_one_label_scores_and_ranks(tmp_path: Path) -> None:
    model = classifier(tmp_path / "model", {"0": "LABEL_0"})
    scored, named, raw, ranked, few, classified, generated = answers(
        model,
        tmp_path / "run",
        ONE,
        {"url": "/v1/score", "body": {"queries": [QUERY] * 3, "documents": DOCUMENTS}},
        {**ONE, "use_activation": False},
        {"url": "/v1/rerank", "body": {"model": "m", "query": QUERY, "documents": DOCUMENTS}},
        {"query": QUERY, "documents": [{"text": text} for text in DOCUMENTS], "top_n": 2, "return_documents": False},
        {"url": "/v1/classify", "body": {"input": [QUERY + text for text in DOCUMENTS[:2]]}},
        {"prompt": "the fox"},
    )  # fmt: skip
    scores = [row["score"] for row in scored["data"]]
    assert [(row["index"], row["object"]) for row in scored["data"]] == [(i, "score") for i in range(3)]
    assert len(set(scores)) == 3
    assert named["data"] == scored["data"]
    logits = np.array([row["score"] for row in raw["data"]])
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits)), rtol=1e-12)
    order = sorted(range(3), key=lambda index: -scores[index])
    assert ranked["results"] == [
        {"index": index, "document": {"text": DOCUMENTS[index]}, "relevance_score": scores[index]}
        for index in order
    ]
    assert few["results"] == [{"index": index, "relevance_score": scores[index]} for index in order[:2]]
    assert ranked["usage"] == scored["usage"]
    assert [row["num_classes"] for row in classified["data"]] == [1, 1]
    # A pair is the tokens of both texts behind one another, if the tokenizer knows nothing else to do.
    assert (
        "the model has no LM head: it classifies, and /v1/completions needs" in generated["error"]["message"]
    )
    with h5py.File(tmp_path / "run/out/results.h5") as h5:
        assert h5["relevance/values"][:3].tolist() == scores
        assert len(h5["probabilities/values"]) == 2


def cross_encoder(folder: Path) -> Path:
    """The small BERT with one label, and a tokenizer that puts pairs together as BERT's do."""
    shutil.copytree(FOLDER / "bert_labels", folder)
    tensors = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = tensors[name][:1].copy()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    new = {
        **config,
        "id2label": {"0": "LABEL_0"},
        "sbert_ce_default_activation_function": "torch.nn.Identity",
    }
    (folder / "config.json").write_text(json.dumps(new))
    plain = ["the", "fox", "quick", "brown", "a", "ship", "that", "sails", "sea", "##s"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *plain]
    core = Tokenizer(models.WordPiece({word: id for id, word in enumerate(words)}, unk_token="[UNK]"))
    core.add_special_tokens(words[:4])
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    core.save(str(folder / "tokenizer.json"))
    module = {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}
    (folder / "modules.json").write_text(json.dumps([module]))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 70, "do_lower_case": false}')
    return folder


def test_a_cross_encoder_reads_pairs(tmp_path: Path) -> None:
    """The second text is of the second segment; what cannot be done is an error of its line."""
    model = cross_encoder(tmp_path / "model")
    scored, ranked, vectors, generated, chat, long = answers(
        model,
        tmp_path / "run",
        ONE,
        {"query": QUERY, "documents": DOCUMENTS[::-1]},
        {"input": [QUERY, "ships"]},
        {"prompt": "the fox"},
        {"messages": [{"role": "user", "content": "the fox"}]},
        {"text_1": QUERY, "text_2": "the " * 68},
        memory={"kv_type": "f32"},
        wire={"activations": "f32"},
    )
    ids = [
        [2, 4, 5, 3, *document, 3] for document in ([4, 6, 7, 5], [8, 9, 10, 11, 4, 12], [4, 5, 1, 1, 1, 1])
    ]
    pairs = [
        Request(str(i), tuple(pair), kind="embed", pooling="cls", second=4) for i, pair in enumerate(ids)
    ]
    found = classifier_of(model)
    assert found is not None
    states = [
        completion.embedding for completion in run_engine(model, pairs, kv_type="f32", activations="f32")
    ]
    expected = [float(logits_of(found, state)[0]) for state in states if state is not None]
    assert [row["score"] for row in scored["data"][:2]] == expected[:2]
    assert len(set(expected)) == 3
    assert sorted(row["relevance_score"] for row in ranked["results"]) == sorted(
        row["score"] for row in scored["data"]
    )
    assert [len(row["embedding"]) for row in vectors["data"]] == [32, 32]
    for refused, url in ((generated, "/v1/completions"), (chat, "/v1/chat/completions")):
        assert f"the model has no LM head: it classifies, and {url} needs" in refused["error"]["message"]
    assert "and the model takes 70 tokens; shorten it" in long["error"]["message"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, lambda x: np.exp(x) / np.exp(x).sum()),
        ({"problem_type": "multi_label_classification"}, lambda x: 1 / (1 + np.exp(-x))),
        ({"problem_type": "regression"}, lambda x: x),
    ],
)
def test_labels_and_what_becomes_of_logits(config: Any, expected: Any, tmp_path: Path) -> None:
    labels = {"0": "good", "1": "bad", "2": "neither"}
    model = classifier(tmp_path / "model", labels, **config)
    body = {"input": ["the fox", "the sea"]}
    found, raw, refused = answers(
        model,
        tmp_path / "run",
        {"url": "/v1/classify", "body": body},
        {"url": "/v1/classify", "body": {**body, "use_activation": False}},
        ONE,
    )
    for row, logits in zip(found["data"], raw["data"], strict=True):
        np.testing.assert_allclose(row["probs"], expected(np.array(logits["probs"])), rtol=1e-12)
        assert row["label"] == labels[str(np.argmax(row["probs"]))]
    assert "3 labels (good, bad, neither)" in refused["error"]["message"]


def test_a_model_that_answers_yes_or_no(tmp_path: Path) -> None:
    """Its score is what the probabilities of two words say behind its template; control tokens are the template's."""
    template = "<s>Is {document} about {query}?<|assistant|>"
    scoring = {"template": template, "tokens": ["n", "y"]}
    prompts = [template.format(query=QUERY, document=text) for text in DOCUMENTS[:2]]
    lines = [{"prompt": prompt, "max_tokens": 1, "logprobs": 1000} for prompt in prompts]
    # A document is cut where a pair has too many tokens; what stands around it stays.
    cuts = [{"text_1": QUERY, "text_2": text} for text in ("a lazy dog " * 900, "a lazy dog " * 2)]
    asked = [{**cut, "truncate_prompt_tokens": count} for cut in cuts for count in (60, -1, 3)]
    scored, *others = answers(CHAT, tmp_path / "run", ONE, *lines, *asked, cuts[0], cuts[1], scoring=scoring)
    generated, cut = others[:2], others[2:]
    used = [body["usage"]["prompt_tokens"] if "usage" in body else None for body in cut]
    whole = used[7]
    assert used[2:] == [None, whole, whole, None, None, whole]
    assert 57 <= used[0] <= 60  # a cut word may be fewer tokens
    assert 509 <= used[1] <= 512
    assert whole < 60
    assert [cut[index]["data"] for index in (3, 4)] == [cut[7]["data"]] * 2
    assert "truncate_prompt_tokens 3 leaves nothing of the document in the pair" in cut[2]["error"]["message"]
    assert "more than 512 tokens" in cut[6]["error"]["message"]
    for row, answer in zip(scored["data"], generated, strict=False):
        top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        expected = 1 / (1 + np.exp(top["n"] - top["y"]))
        np.testing.assert_allclose(row["score"], expected, rtol=1e-5)
    wrong = run(
        tmp_path / "run/job.toml",
        "--output",
        str(tmp_path / "wrong"),
        "--set",
        'scoring.tokens=["fox no","y"]',
    )
    assert wrong.returncode == 2
    assert "scoring.tokens has 'fox no', which is" in wrong.stderr


def test_the_cosine_of_vectors(tmp_path: Path) -> None:
    texts, few = {"input": [QUERY, *DOCUMENTS]}, {"truncate_prompt_tokens": 4}
    scored, vectors, refused, cut, cut_vectors = answers(
        CHAT, tmp_path / "run", ONE, texts, {**ONE, "instruction": "x"}, {**ONE, **few}, {**texts, **few}
    )
    first, *rest = (np.array(row["embedding"]) for row in cut_vectors["data"])
    np.testing.assert_allclose([row["score"] for row in cut["data"]], [d @ first for d in rest], rtol=1e-6)
    assert cut["usage"] == cut_vectors["usage"] != vectors["usage"]
    query, *documents = (np.array(row["embedding"]) for row in vectors["data"])
    np.testing.assert_allclose(
        [row["score"] for row in scored["data"]], [d @ query for d in documents], rtol=1e-6
    )
    assert "instruction and use_activation are for models that read both" in refused["error"]["message"]


# Bodies as vLLM's pages on run-batch, scores and ranks show them, with names of models that are not ours.
OF_VLLM: list[tuple[str, dict[str, Any], set[str]]] = [
    (
        "/v1/chat/completions",
        {
            "model": "meta-llama/Meta-Llama-3-8B-Instruct",
            "messages": [
                {"role": "system", "content": "You are kind."},
                {"role": "user", "content": "Hello!"},
            ],
            "max_completion_tokens": 20,
        },
        {"id", "object", "created", "model", "choices", "usage"},
    ),
    (
        "/v1/embeddings",
        {"model": "intfloat/e5-mistral-7b-instruct", "input": "You are kind."},
        {"id", "object", "created", "model", "data", "usage"},
    ),
    (
        "/v1/score",
        {"model": "BAAI/bge-reranker-v2-m3", "queries": QUERY, "documents": DOCUMENTS[:2]},
        {"id", "object", "created", "model", "data", "usage"},
    ),
    (
        "/score",
        {
            "model": "BAAI/bge-reranker-v2-m3",
            "text_1": QUERY,
            "text_2": DOCUMENTS[:2],
            "encoding_format": "float",
        },
        {"id", "object", "created", "model", "data", "usage"},
    ),
    *(
        (
            url,
            {"model": "BAAI/bge-reranker-base", "query": QUERY, "documents": DOCUMENTS, "top_n": 2},
            {"id", "model", "usage", "results"},
        )
        for url in ("/v1/rerank", "/rerank", "/v2/rerank")
    ),
]


def test_documented_batches_of_vllm_run_as_they_are(tmp_path: Path) -> None:
    lines = [
        {"custom_id": f"request-{number}", "method": "POST", "url": url, "body": body}
        for number, (url, body, _) in enumerate(OF_VLLM, 1)
    ]
    chat, vector, scored, again, *ranked = found = answers(CHAT, tmp_path / "run", *lines)
    ChatCompletion.model_validate(chat, strict=True)
    CreateEmbeddingResponse.model_validate(vector, strict=True)
    for body, (_, _, keys) in zip(found, OF_VLLM, strict=True):
        assert keys <= body.keys()
        assert {"prompt_tokens", "total_tokens"} <= body["usage"].keys()
    assert {"index", "message", "logprobs", "finish_reason", "stop_reason"} <= chat["choices"][0].keys()
    assert vector["data"][0].keys() == {"object", "index", "embedding"}
    assert [(row["index"], row["object"]) for row in scored["data"]] == [(0, "score"), (1, "score")]
    assert [row["score"] for row in again["data"]] == [row["score"] for row in scored["data"]]
    for body in ranked:
        assert [row.keys() for row in body["results"]] == [{"index", "document", "relevance_score"}] * 2
        assert body["results"] == ranked[0]["results"]
