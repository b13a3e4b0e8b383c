"""Rotary embedding against transformers' values, and against its own definition."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpillm.model.config import ModelConfig
from mpillm.model.families import read_config
from mpillm.model.rope import CHUNK, RopeConfig, RopeTable, cos_sin, inv_freq, rope_table

GOLDEN = json.loads((Path(__file__).parent.parent / "fixtures/golden/rope.json").read_text())
F32 = np.float32


def config_of(case: dict[str, Any], style: str) -> ModelConfig:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2 * case["head_dim"],
        "intermediate_size": 8,
        "max_position_embeddings": GOLDEN["max_position_embeddings"],
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 11,
    }
    parameters = dict(case["rope_parameters"])
    if style == "new":
        return read_config({**config, "rope_parameters": parameters})
    theta, kind = parameters.pop("rope_theta"), parameters.pop("rope_type")
    key = "type" if style == "oldest" else "rope_type"
    return read_config({**config, "rope_theta": theta, "rope_scaling": {key: kind, **parameters}})


@pytest.mark.parametrize("style", ["new", "old", "oldest"])
@pytest.mark.parametrize(
    "case", GOLDEN["cases"], ids=lambda case: f"{case['rope_parameters']['rope_type']}-{case['head_dim']}"
)
def test_values_are_those_of_transformers(case: dict[str, Any], style: str) -> None:
    rotary = config_of(case, style).layers[0].mixer.rotary
    assert rotary is not None
    ours, theirs = inv_freq(rotary.config, rotary.dim), np.array(case["inv_freq"], F32)
    assert ours.dtype == F32
    # torch's own power function may be off by one unit in the last place: 2^-23 of the value.
    np.testing.assert_allclose(ours, theirs, rtol=1.3e-7, atol=0)
    assert rotary.config.attention_factor == pytest.approx(case["attention_factor"], rel=1e-15)

    cos, sin = cos_sin(rotary.config, rotary.dim, GOLDEN["positions"])
    position = np.array(GOLDEN["positions"])[:, None]
    bound = case["attention_factor"] * (2e-7 + 2 * np.abs(ours - theirs) * position)
    assert (np.abs(cos - np.array(case["cos"])) <= bound).all()
    assert (np.abs(sin - np.array(case["sin"])) <= bound).all()


@pytest.mark.parametrize("head_dim", [2, 8, 24, 80])
def test_definition(head_dim: int) -> None:
    theta, scale = 123456.0, 1.25
    factors = tuple(np.random.default_rng(head_dim).uniform(1, 9, head_dim // 2).tolist())
    rope = RopeConfig(theta, "factors", factors=factors, attention_factor=scale)
    for position in (0, 1, 77, 511):
        cos, sin = cos_sin(rope, head_dim, [position])
        assert cos.shape == sin.shape == (1, head_dim // 2)
        for i, factor in enumerate(factors):
            angle = position * theta ** (-2 * i / head_dim) / factor
            # Angles are float32 as in transformers: half a unit in the last place, twice.
            assert cos[0, i] == pytest.approx(scale * math.cos(angle), abs=1e-6 + 2e-7 * angle)
            assert sin[0, i] == pytest.approx(scale * math.sin(angle), abs=1e-6 + 2e-7 * angle)


def test_rows_do_not_depend_on_what_is_asked_together() -> None:
    rope, random = RopeConfig(5e5, "linear", factor=3.0), np.random.default_rng(5)
    positions = random.integers(0, 5 * CHUNK, 200).astype(np.int32)
    cos, sin = RopeTable(rope, 16).cos_sin(positions)
    for i in random.integers(0, 200, 20):
        one_cos, one_sin = RopeTable(rope, 16).cos_sin([int(positions[i])])
        assert (one_cos[0] == cos[i]).all()
        assert (one_sin[0] == sin[i]).all()
    assert cos.dtype == sin.dtype == F32


def test_empty_and_shared_table() -> None:
    cos, sin = cos_sin(RopeConfig(), 8, [])
    assert cos.shape == sin.shape == (0, 4)
    assert rope_table(RopeConfig(), 8) is rope_table(RopeConfig(), 8)
