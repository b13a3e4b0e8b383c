"""Configurations for tests: a small one of any family, those of fixtures, and what they are read as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpillm.model.config import ModelConfig
from mpillm.model.families import MODEL_TYPES, read_config
from mpillm.model.layers.attention import AttentionSpec
from mpillm.model.rope import RopeConfig

MODELS = Path(__file__).parent.parent / "fixtures/models"


PUBLISHED = json.loads((Path(__file__).parent.parent / "data/published_configs.json").read_text())


# The keys of further published files, with tiny sizes.
KEYS = json.loads((Path(__file__).parent.parent / "data/published_keys.json").read_text())


SIZES = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}


MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}


def read(kind: str = "llama", **more: Any) -> ModelConfig:
    named = {"model_type": kind, "architectures": [MODEL_TYPES[kind]]}
    return read_config({**SIZES, **named, **more})


def attention(config: ModelConfig) -> AttentionSpec:
    """That of the first layer."""
    return config.layers[0].mixer


def windows(config: ModelConfig) -> tuple[int, ...]:
    return tuple(getattr(layer.mixer, "window", 0) for layer in config.layers)


def rope(config: ModelConfig) -> RopeConfig:
    """That of all layers."""
    (rotary,) = {layer.mixer.rotary for layer in config.layers}
    assert rotary is not None
    if isinstance(config.layers[0].mixer, AttentionSpec):
        assert (rotary.dim, rotary.interleaved) == (attention(config).head_dim, False)
    return rotary.config


def experts(config: ModelConfig) -> tuple[int, ...]:
    """The experts of each layer."""
    return tuple(layer.mlp.count for layer in config.layers)


def fixture(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((MODELS / name / "config.json").read_text())
    return config
