from __future__ import annotations

import pytest

from mpillm.weights import names
from mpillm.weights.names import USUAL, Parsed
from mpillm.weights.roles import ROLES, TASK_ROLES, Key, hf_name

ENTRY = ("embed", "positions", "segments", "embed_norm", "embed_norm_bias")
GLOBAL = (*ENTRY, "final_norm", "final_norm_bias", *TASK_ROLES)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("layer", [0, 7, 127])
def test_usual_names_are_parsed_back(role, layer):
    key = Key(role, -1 if role in GLOBAL else layer)
    parsed = Parsed((role,), key.layer, -1, False)
    assert USUAL.parse_hf(hf_name(key)) == parsed
    assert USUAL.parse_gguf(ROLES[role].gguf.format(l=key.layer)) == parsed


@pytest.mark.parametrize("role", ["gate", "up", "down"])
def test_experts(role):
    key = Key(role, 3, 11)
    assert USUAL.parse_hf(hf_name(key)) == Parsed((role,), 3, 11, False)
    assert USUAL.parse_gguf(f"blk.3.ffn_{role}_exps.weight") == Parsed((role,), 3, -1, True)
    assert USUAL.parse_gguf(f"blk.3.ffn_{role}.11.weight") == Parsed((role,), 3, 11, False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.1.block_sparse_moe.experts.2.w1.weight", Parsed(("gate",), 1, 2, False)),
        ("model.layers.1.block_sparse_moe.experts.2.w2.weight", Parsed(("down",), 1, 2, False)),
        ("model.layers.1.block_sparse_moe.experts.2.w3.weight", Parsed(("up",), 1, 2, False)),
        ("model.layers.1.block_sparse_moe.gate.weight", Parsed(("router",), 1, -1, False)),
        ("model.layers.1.mlp.experts.gate_up_proj", Parsed(("gate", "up"), 1, -1, True)),
        ("model.layers.1.mlp.experts.down_proj", Parsed(("down",), 1, -1, True)),
        ("model.layers.1.experts.2.gate_proj.weight", Parsed(("gate",), 1, 2, False)),
        ("model.layers.1.moe.experts.2.down_proj.weight", Parsed(("down",), 1, 2, False)),
        ("model.layers.1.feed_forward.experts.2.up_proj.weight", Parsed(("up",), 1, 2, False)),
        ("layers.1.mlp.gate.weight", Parsed(("router",), 1, -1, False)),
        ("embed_tokens.weight", Parsed(("embed",), -1, -1, False)),
        ("norm.weight", Parsed(("final_norm",), -1, -1, False)),
    ],
)
def test_other_names_in_checkpoints(name, expected):
    assert USUAL.parse_hf(name) == expected


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.01.mlp.up_proj.weight",
        "model.layers.-1.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight_scale",
        "model.layers.1.self_attn.rotary",
        "xmodel.norm.weight",
        "model.norm.weight\n",
        "model.layers.12345678.mlp.up_proj.weight",
        "",
    ],
)
def test_unknown_names(name):
    assert USUAL.parse_hf(name) is None
    assert USUAL.parse_gguf(name) is None


def test_buffers_of_old_checkpoints_are_ignored():
    assert names.ignored_hf("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert names.ignored_hf("rotary_emb.inv_freq")
    assert names.ignored_hf("model.layers.0.self_attn.k_proj.kv_scale")
    assert names.ignored_hf("model.layers.0.self_attn.k_zero_point")
    assert names.ignored_gguf("rope_freqs.weight")
    assert not names.ignored_hf("model.layers.0.self_attn.q_proj.weight")
