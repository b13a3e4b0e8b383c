"""Embeddings are what the model's own files say: pooling, normalisation and prompts; before and after packing."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import h5py
import numpy as np
import pytest

from mpillm.errors import ModelError
from mpillm.model.embedding import embedding_settings
from mpillm.model.opening import open_source
from tests.conftest import ROOT, clean_environment, run_bounded
from tests.job_helpers import CHAT

IDS = [5, 6, 7, 8]
TYPE = "sentence_transformers.models"


def modules(folder: Path, pooling: dict[str, Any], *more: str, prompts: Any = None) -> Path:
    """A copy of a model that Sentence Transformers would read."""
    shutil.copytree(CHAT, folder)
    names = ["Transformer", "Pooling", *more]
    listed = [
        {
            "idx": index,
            "name": str(index),
            "path": f"{index}_{name}" if index else "",
            "type": f"{TYPE}.{name}",
        }
        for index, name in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 40, **pooling}))
    if prompts is not None:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return folder


def embed(model: Path, folder: Path, *bodies: dict[str, Any]) -> list[Any]:
    """The answers of a run; what HDF5 has must be the same vectors."""
    folder.mkdir(exist_ok=True)
    source = folder / "in.jsonl"
    source.write_text("".join(f"{json.dumps(body)}\n" for body in bodies))
    words = ["run", "--model", model, "--input", source, "--output", folder / "out"]
    done = run_bounded([sys.executable, "-m", "mpillm", *words], env=clean_environment())
    assert done.returncode in (0, 1), done.stderr
    lines = [
        json.loads(line)["response"]["body"]
        for line in (folder / "out/results.jsonl").read_text().splitlines()
    ]
    shown = [row["embedding"] for line in lines for row in line.get("data", [])]
    with h5py.File(folder / "out/results.h5") as h5:
        stored, offsets = h5["embeddings/values"][:], h5["embeddings/offsets"][:]
    for index, vector in enumerate(shown):
        np.testing.assert_array_equal(stored[offsets[index] : offsets[index + 1]], np.float32(vector))
    return [line["data"][0]["embedding"] if "data" in line else line["error"]["message"] for line in lines]


def test_a_directory_says_how(tmp_path: Path) -> None:
    prompts = {"prompts": {"query": "the fox ", "document": ""}, "default_prompt_name": None}
    model = modules(
        tmp_path / "model",
        {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False},
        prompts=prompts,
    )
    packed = tmp_path / "packed"
    done = run_bounded([sys.executable, "-m", "mpillm", "pack", model, packed], env=clean_environment())
    assert done.returncode == 0, done.stderr
    bodies = [
        {"input": IDS},
        {"input": IDS, "pooling": "last", "normalize": False},
        {"input": IDS, "pooling": "mean", "normalize": True},
        {"input": IDS, "pooling": "last", "normalize": True, "dimensions": 7},
        {"input": "over the dog", "prompt_name": "query"},
        {"input": "the fox over the dog"},
        {"input": "over the dog", "prompt_name": "other"},
        {"input": IDS, "dimensions": 10**6},
    ]  # fmt: skip
    found = embed(model, tmp_path / "1", *bodies)
    plain, last, mean, short, asked, written, unknown, large = found
    assert plain == last != mean  # no Normalize module
    assert len(short) == 7
    np.testing.assert_allclose(np.linalg.norm(short), 1, rtol=1e-6)
    np.testing.assert_allclose(np.divide(short, last[:7]), np.full(7, short[0] / last[0]), rtol=1e-4)
    assert asked == written
    assert "no prompt 'other'; it has 'query', 'document'" in unknown
    assert "dimensions 1000000 is more than the model's" in large
    assert embed(packed, tmp_path / "2", *bodies) == found


@pytest.mark.parametrize(
    ("pooling", "more", "expected"),
    [
        ({"pooling_mode": "lasttoken"}, ["Normalize"], ("last", True, "")),
        ({"pooling_mode": "mean"}, [], ("mean", False, "")),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, ["Normalize"], ("mean", True, "")),
        ({"pooling_mode_cls_token": True}, [], ("cls", False, "")),
        ({"pooling_mode_max_tokens": True}, [], ("mean", False, "pooling 'max_tokens'")),
        ({"pooling_mode_max_tokens": 1, "pooling_mode_lasttoken": 1}, [],
         ("mean", False, "pooling 'max_tokens and lasttoken'")),
        ({"pooling_mode_lasttoken": True}, ["Bow", "Normalize"], ("last", True, "the module Bow")),
    ],
)  # fmt: skip
def test_what_pooling_says(pooling: Any, more: list[str], expected: Any, tmp_path: Path) -> None:
    source = open_source(modules(tmp_path / "model", pooling, *more))
    found = embedding_settings(source)
    source.close()
    assert (found.pooling, found.normalize, found.unsupported) == expected


def test_what_is_not_supported_is_an_error_of_the_line(tmp_path: Path) -> None:
    model = modules(tmp_path / "model", {"pooling_mode_max_tokens": True})
    refused, answered = embed(model, tmp_path / "run", {"input": IDS}, {"input": IDS, "pooling": "last"})
    assert "the model's embeddings need pooling 'max_tokens', which is not supported" in refused
    assert len(answered) > 1
    prompts = {"prompts": {"query": "find ", "none": ""}}
    model = modules(
        tmp_path / "left_out", {"pooling_mode_mean_tokens": True, "include_prompt": False}, prompts=prompts
    )
    bodies: list[dict[str, Any]] = [
        {"input": "a", "prompt_name": "query"},
        {"input": "a", "prompt_name": "none"},
    ]
    bodies += [{"input": "a"}, {**bodies[0], "pooling": "last"}]
    refused, *answered = embed(model, tmp_path / "left_out_run", *bodies)
    assert "exclude prompts from pooling (include_prompt), which is not supported" in refused
    assert all(len(vector) > 1 and not isinstance(vector, str) for vector in answered)
    (tmp_path / "model/modules.json").write_text("{")
    source = open_source(tmp_path / "model")
    with pytest.raises(ModelError, match=r"modules.json cannot be read"):
        embedding_settings(source)
    source.close()


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4])
def test_a_gguf_file_says_how(kind: int, tmp_path: Path) -> None:
    original = ROOT / "tests/fixtures/gguf/qwen3_bf16.gguf"
    reader = gguf.GGUFReader(original)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    writer.add_pooling_type(gguf.PoolingType(kind))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    bodies = [{"input": IDS}, *({"input": IDS, "pooling": pooling} for pooling in ("mean", "cls", "last"))]
    found, mean, first, last = embed(tmp_path / "m.gguf", tmp_path / "run", *bodies)
    wanted = {0: mean, 1: mean, 2: first, 3: last}
    if kind in wanted:
        assert found == wanted[kind]
        assert mean != last != first
    else:
        assert "need pooling 'rank'" in found
