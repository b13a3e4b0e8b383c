"""What families of models share, and what their published files hold besides."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpillm.errors import ModelError
from mpillm.model.families import FAMILIES
from mpillm.model.opening import config_of, open_source

MODELS = Path(__file__).parent.parent / "fixtures/models"


def test_every_architecture_has_defaults_and_belongs_to_one_family() -> None:
    names = [name for family in FAMILIES for name in family.architectures]
    assert len(names) == len(set(names))
    for family in FAMILIES:
        assert set(family.defaults) == set(family.architectures)


@pytest.mark.parametrize("further", [0, 1])
def test_layers_that_predict_further_tokens_are_not_read(tmp_path: Path, further: int) -> None:
    """GLM-4.5 is published with such a layer behind its own ones."""
    folder = shutil.copytree(MODELS / "glm4_moe", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.4.eh_proj.weight"] = np.ones((32, 64), np.float32)
    tensors["model.layers.4.input_layernorm.weight"] = np.ones(32, np.float32)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": further}))
    if further:
        with closing(open_source(folder)) as source:
            assert config_of(source).n_layers == 4
    else:
        with pytest.raises(ModelError, match="belongs to no architecture that is supported"):
            open_source(folder)


def test_a_tied_head_is_the_default_of_some_families(tmp_path: Path) -> None:
    folder = shutil.copytree(MODELS / "gemma2", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("tie_word_embeddings") is True
    (folder / "config.json").write_text(json.dumps(config))
    with closing(open_source(folder)) as source:
        config_of(source)


def test_tensors_that_no_text_is_generated_with(tmp_path: Path) -> None:
    """A classifier's head, and layers that predict further tokens under a name of their own."""
    folder = shutil.copytree(MODELS / "llama2", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in (
        "score.weight",
        "v_head.summary.weight",
        "model.position_ids",
        "model.layers.0.self_attn.masked_bias",
        "model.layers.1.self_attn.k_proj.k_scale",
        "model.layers.1.self_attn.v_scale",
        "mtp.layers.0.input_layernorm.weight",
        "model.mtp_block.0.mlp.up_proj.weight",
    ):
        tensors[name] = np.ones((2, 48), np.float32)
    save_file(tensors, folder / "model.safetensors")
    with closing(open_source(folder)) as source:
        config_of(source)


def test_a_configuration_is_judged_before_tensors(tmp_path: Path) -> None:
    folder = shutil.copytree(MODELS / "llama2", tmp_path / "model")
    save_file({"strange": np.ones(1, np.float32)}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for change, words in (
        (
            {"architectures": ["StrangeForCausalLM"]},
            "'StrangeForCausalLM' is not supported; mpillm models --architectures lists",
        ),
        ({"clip_qkv": 8.0}, "clip_qkv = 8.0 may change the result"),
        ({}, "tensor 'strange' belongs to no architecture"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelError, match=words):
            open_source(folder)
