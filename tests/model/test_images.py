"""Models with parts for images: their text part is the model that its class would be."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpillm.errors import ModelError
from mpillm.model.families import read_config
from mpillm.model.opening import config_of, open_unpacked
from mpillm.weights.formats.hf import of_text
from mpillm.weights.roles import hf_name
from tests.model.golden import model_path

BEFORE, BESIDE = ("language_model.model.", "language_model."), ("model.language_model.", "")


def with_images(folder: Path, name: str, outer: dict[str, Any], kind: str, prefixes: tuple[str, str]) -> Path:
    """A fixture as the text part of a model whose configuration has `outer` too; `kind` is the text's model_type."""
    folder.mkdir()
    config = json.loads((model_path(name) / "config.json").read_text())
    del config["architectures"]
    text = {**config, "model_type": kind}
    (folder / "config.json").write_text(json.dumps({**outer, "text_config": text, "vision_config": {}}))
    of_layers, others = prefixes
    tensors = {
        of_layers + tensor.removeprefix("model.") if tensor.startswith("model.") else others + tensor: value
        for tensor, value in load_file(model_path(name) / "model.safetensors").items()
    }
    if outer["model_type"] == "qwen3_vl_moe":
        tensors = dict(transposed_experts(tensors))
    seen = np.ones((2, 3), np.float32)
    beside = {
        "vision_tower.patch.weight": seen,
        "model.vision_embedder.patch_dense.weight": seen,
        "multi_modal_projector.linear_1.weight": seen,
    }
    beside = {"model.visual.blocks.0.norm.weight": seen} if not others else beside
    save_file({**tensors, **beside}, folder / "model.safetensors")
    return folder


def transposed_experts(tensors: dict[str, np.ndarray]) -> Any:
    """Experts one by one as all of them together, each transposed, gate beside up."""
    experts: dict[str, dict[str, list[tuple[int, np.ndarray]]]] = {}
    for name, value in tensors.items():
        if ".experts." not in name:
            yield name, value
            continue
        before, _, after = name.partition(".experts.")
        number, role, _ = after.split(".")
        of_layer = experts.setdefault(before, {})
        of_layer.setdefault(role, []).append((int(number), value))
    for before, roles in experts.items():
        gate, up, down = (
            np.stack(
                [
                    np.ascontiguousarray(value.T)
                    for _, value in sorted(roles[f"{role}_proj"], key=lambda one: one[0])
                ]
            )
            for role in ("gate", "up", "down")
        )
        yield f"{before}.experts.gate_up_proj", np.ascontiguousarray(np.concatenate([gate, up], axis=2))
        yield f"{before}.experts.down_proj", down


@pytest.mark.parametrize(
    ("name", "outer", "kind", "prefixes"),
    [
        ("gemma3", "Gemma3", "gemma3_text", BEFORE),
        ("ministral3", "Mistral3", "ministral3", BEFORE),
        ("llama4", "Llama4", "llama4_text", BEFORE),
        ("llama3", "Llava", "llama", BESIDE),
        ("qwen2", "Qwen2_5_VL", "qwen2_5_vl_text", BESIDE),
        ("qwen3", "Qwen3VL", "qwen3_vl_text", BESIDE),
        ("qwen3_moe", "Qwen3VLMoe", "qwen3_vl_moe_text", BESIDE),
        ("glm4", "Glm4v", "glm4v_text", BESIDE),
        ("gemma4", "Gemma4", "gemma4_text", BESIDE),
    ],
)
def test_the_text_part_is_the_same_model(
    name: str, outer: str, kind: str, prefixes: tuple[str, str], tmp_path: Path
) -> None:
    types = {"Qwen3VLMoe": "qwen3_vl_moe"}
    named = {
        "architectures": [f"{outer}ForConditionalGeneration"],
        "model_type": types.get(outer, outer.lower()),
        "image_token_id": 7,
    }
    folder = with_images(tmp_path / "model", name, named, kind, prefixes)
    with closing(open_unpacked(folder)) as source, closing(open_unpacked(model_path(name))) as text:
        found, expected = config_of(source), config_of(text)
        assert found.architecture == f"{outer}ForConditionalGeneration"
        assert (found.layers, found.vocab, found.eos_ids) == (
            expected.layers,
            expected.vocab,
            expected.eos_ids,
        )
        assert set(source.tensors) == set(text.tensors)
        for key in text.tensors:
            assert (source.read_f32(key) == text.read_f32(key)).all(), hf_name(key)


def test_sizes_that_a_published_file_leaves_out() -> None:
    """Gemma 3 4B's and LLaVA 1.5's configurations."""
    gemma = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    }
    found = read_config(of_text(gemma))
    window, full = found.layers[0].mixer, found.layers[5].mixer
    assert (found.vocab, window.n_heads, window.n_kv_heads, window.window) == (262208, 8, 4, 1024)
    assert (window.rotary.config.theta, window.rotary.config.kind) == (1e4, "default")
    assert (full.rotary.config.theta, full.rotary.config.factor) == (1e6, 8.0)
    llava = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096},
    }
    assert (read_config(of_text(llava)).n_layers, read_config(of_text(llava)).vocab) == (32, 32064)


def test_a_text_part_of_another_kind_is_refused() -> None:
    config = {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "bloom"}}
    with pytest.raises(
        ModelError, match="the text part of LlavaForConditionalGeneration has model_type 'bloom'"
    ):
        read_config(of_text(config))
