"""Weights or activations that are NaN or infinite: an error of the lines that meet them, and the tensor is named."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import Mpi
from tests.e2e.jobs import CHAT, assert_one_sentence, results, run, write_lines
from tests.model.pooled import FOLDER as POOLED

pytestmark = pytest.mark.mpiexec

VOCAB, BAD = 320, 77  # the bad token
TOLD = "The model's output for this request is not finite (NaN or infinity), so there is no answer."


def model_with(folder: Path, **changes: float) -> Path:
    """The chat model with an output head of its own; of each tensor named, one value in row `BAD` (or 7) is changed."""
    shutil.copytree(CHAT, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    for name, value in changes.items():
        tensor = weights[name.replace("__", ".")]
        tensor[(BAD if len(tensor) == VOCAB else 7, *[5] * (tensor.ndim - 1))] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return folder


def mixed(draw: random.Random) -> list[dict[str, Any]]:
    """Requests of all kinds, every second one with the bad token."""
    lines = []
    for number in range(16):
        ids = [draw.choice([id for id in range(6, VOCAB) if id != BAD]) for _ in range(draw.randrange(2, 40))]
        if number % 2:
            ids[draw.randrange(len(ids))] = BAD
        bodies: list[dict[str, Any]] = [
            {"prompt": ids, "max_tokens": 6, "logprobs": 2},
            {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1},
            {"input": ids},
            {"prompt": ids, "max_tokens": 6, "temperature": 1.1, "n": 2},
        ]
        lines.append({"custom_id": f"{'bad' if number % 2 else 'good'} {number}", **bodies[number // 2 % 4]})
    draw.shuffle(lines)
    return lines


@pytest.mark.parametrize(
    ("value", "ranks", "settings"),
    [
        (np.nan, 1, ["quantize=q8_0"]),
        (np.inf, 2, ["layout.stages=2", "batch.max_num_seqs=3", "memory.kv=16000"]),
        (-np.inf, 2, ["layout.shards=2", "memory.kv=16000", "memory.kv_type=f16", "wire.activations=q8_0"]),
    ],
)
def test_lines_with_a_token_that_is_not_finite(
    value: float, ranks: int, settings: list[str], openmpi: Mpi, tmp_path: Path
) -> None:
    """They are errors, alone and beside others; the others' answers are those of the model without it."""
    broken = model_with(tmp_path / "broken/small", model__embed_tokens__weight=value)
    sound = model_with(tmp_path / "sound/small")
    source = write_lines(tmp_path / "in.jsonl", mixed(random.Random(ranks)))
    done = run(openmpi, ranks, source, tmp_path / "out", *settings, model=broken)
    assert done.returncode == 1, done.stderr
    assert "is not finite (NaN or infinity) for 8 requests: in" in done.stderr
    assert "embed is not; fetch or convert the model again." in done.stderr
    assert run(openmpi, ranks, source, tmp_path / "without", *settings, model=sound).returncode == 0
    pairs = list(zip(results(tmp_path / "out"), results(tmp_path / "without"), strict=True))
    for found, wanted in pairs:
        if found["custom_id"].startswith("good"):
            assert found == wanted
        else:
            assert found["response"]["status_code"] == 500
            assert found["error"]["message"] == TOLD


@pytest.mark.parametrize(
    ("tensor", "called"),
    [
        ("model__layers__1__mlp__down_proj__weight", "down of layer 1"),
        ("lm_head__weight", "head"),
    ],
)
def test_a_matrix_that_is_not_finite_is_named(tensor: str, called: str, openmpi: Mpi, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "the fox"}, {"prompt": "a", "temperature": 1}])
    done = run(openmpi, 2, source, tmp_path / "out", model=model_with(tmp_path / "small", **{tensor: np.nan}))
    assert done.returncode == 1, done.stderr
    assert f"in {tmp_path / 'small'}, {called} is not; fetch or convert the model again." in done.stderr
    assert [line["error"]["message"] for line in results(tmp_path / "out")] == [TOLD, TOLD]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert set(report["errors"].values()) == {TOLD}


def test_a_classifier_that_is_not_finite(openmpi: Mpi, tmp_path: Path) -> None:
    """What follows pooling is looked at, too: a weight that is NaN, and weights whose products overflow."""
    for value, said in ((np.nan, "classifier is not; fetch"), (3e38, "though its weights are")):
        model = tmp_path / f"labels-{value}"
        shutil.copytree(POOLED / "bert_labels", model)
        weights = load_file(model / "model.safetensors")
        (name,) = (name for name in weights if name.endswith("classifier.weight"))
        weights[name][1] = np.float32(value)
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        bodies: list[dict[str, Any]] = [
            {"input": [[7, 8, 9], [6]]},
            {"input": [9, 9], "use_activation": False},
        ]
        source = write_lines(
            tmp_path / "in.jsonl",
            [{"url": "/v1/classify", "custom_id": str(n), "body": body} for n, body in enumerate(bodies)],
        )
        done = run(openmpi, 1, source, tmp_path / f"out-{value}", model=model)
        assert done.returncode == 1, done.stderr
        assert said in done.stderr
        assert "Warning" not in done.stderr
        assert [line["error"]["message"] for line in results(tmp_path / f"out-{value}")] == [TOLD, TOLD]


def test_a_norm_that_is_not_finite_is_an_error_of_the_model(openmpi: Mpi, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "the fox"}])
    model = model_with(tmp_path / "small", model__layers__1__input_layernorm__weight=np.inf)
    done = run(openmpi, 2, source, tmp_path / "out", model=model)
    assert_one_sentence(done, 2, "attn_norm of layer 1 has values that are not finite (NaN or infinity)")
