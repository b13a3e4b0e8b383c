"""A matrix with each head's rows of two others: what lies in the file, and what is read as k_b and as v_b."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpillm.errors import ModelError
from mpillm.kernels import BlockType
from mpillm.model.opening import config_of, open_source, open_unpacked
from mpillm.weights.roles import Key

FIXTURES = Path(__file__).parent.parent / "fixtures"
HEADS, LATENT, PART, VALUE = 4, 24, 14, 11  # of deepseek_v3


def changed(tmp_path: Path, **config: int) -> Path:
    """A copy of deepseek_v3 with another configuration."""
    folder = shutil.copytree(FIXTURES / "models/deepseek_v3", tmp_path / "model")
    old = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**old, **config}))
    return folder


def test_any_rows_and_columns_are_those_of_the_matrix_in_the_file(tmp_path: Path) -> None:
    folder = changed(tmp_path)
    together = load_file(folder / "model.safetensors")["model.layers.1.self_attn.kv_b_proj.weight"]
    by_head = together.reshape(HEADS, PART + VALUE, LATENT)
    k_b = by_head[:, :PART].swapaxes(1, 2).reshape(HEADS * LATENT, PART)
    v_b = by_head[:, PART:].reshape(HEADS * VALUE, LATENT)
    with closing(open_unpacked(folder)) as source:
        assert not any(key.role == "kv_b" for key in source.tensors)
        for role, whole in (("k_b", k_b), ("v_b", v_b)):
            key = Key(role, 1)
            assert source.tensors[key].shape == whole.shape
            assert source.tensors[key].nbytes == whole.nbytes
            for rows in (range(len(whole)), range(1), range(5, len(whole) - 3), range(20, 40)):
                assert (source.read_f32(key, rows) == whole[rows.start : rows.stop]).all()
            part = source.read(key, range(3, 30), range(2, 9)).view(np.float32)
            assert (part == whole[3:30, 2:9]).all()
            assert (np.concatenate(list(source.floats(key))) == whole).all()


@pytest.mark.parametrize(("quantize", "type"), [("none", BlockType.F16), ("q8_0", BlockType.Q8_0)])
def test_the_type_of_the_file_stays(quantize: str, type: BlockType) -> None:
    with closing(open_source(FIXTURES / "models/glm4_moe_lite", quantize)) as source:
        config_of(source)
        assert {source.tensors[Key(role, 0)].type for role in ("k_b", "v_b", "o")} == {type}


def test_blocks_that_cannot_be_turned_become_the_numbers_that_they_stand_for() -> None:
    with closing(open_source(FIXTURES / "gguf/deepseek2_q8_0.gguf")) as source:
        config_of(source)
        assert source.tensors[Key("k_b", 0)].type is BlockType.F32
        assert source.tensors[Key("v_b", 0)].type.quantised


def test_a_file_that_has_both_forms(tmp_path: Path) -> None:
    folder = changed(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    ones = np.ones((HEADS * LATENT, PART), np.float32), np.ones((HEADS * VALUE, LATENT), np.float32)
    for role, value in zip(("k_b", "v_b"), ones, strict=True):
        tensors[f"model.layers.0.self_attn.{role}_proj.weight"] = value
    save_file(tensors, folder / "model.safetensors")
    with closing(open_unpacked(folder)) as source:
        config_of(source)
        assert (source.read_f32(Key("k_b", 0), range(5)) == 1).all()
        assert not (source.read_f32(Key("k_b", 1), range(5)) == 1).all()


def test_experts_that_lie_transposed() -> None:
    folder = FIXTURES / "models/llama4"
    tensors = load_file(folder / "model.safetensors")
    together = tensors["model.layers.1.feed_forward.experts.gate_up_proj"]
    down = tensors["model.layers.1.feed_forward.experts.down_proj"]
    width = down.shape[1]
    with closing(open_unpacked(folder)) as source:
        config_of(source)
        for expert in range(len(down)):
            gate_up = together[expert].T
            for role, whole in (("gate", gate_up[:width]), ("up", gate_up[width:]), ("down", down[expert].T)):
                key = Key(role, 1, expert)
                assert source.tensors[key].shape == whole.shape
                assert (source.read_f32(key, range(3, 17)) == whole[3:17]).all()
                assert (source.read(key, None, range(4, 9)).view(np.float32) == whole[:, 4:9]).all()


def test_heads_of_other_sizes_than_the_configuration_says(tmp_path: Path) -> None:
    folder = changed(tmp_path, v_head_dim=12)
    with pytest.raises(ModelError, match=r"kv_b_proj.weight has 100 rows, but 4 heads of 14 \+ 12 have 104"):
        open_source(folder)


def test_norms_of_heads_must_be_complete(tmp_path: Path) -> None:
    """StableLM's lie in a tensor for each head."""
    folder = shutil.copytree(FIXTURES / "models/stablelm_parallel", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_layernorm.norms.{}.weight"
    with closing(open_source(folder)) as source:
        parts = [tensors[name.format(head)] for head in range(2)]
        assert (source.read_f32(Key("k_norm", 1)) == np.concatenate(parts)).all()
    del tensors[name.format(0)]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"heads beside model.layers.1.*norms.1.weight are not complete"):
        open_source(folder)
