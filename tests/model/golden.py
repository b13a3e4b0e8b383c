"""The committed reference values: what transformers computed for the tiny models of `tests/fixtures`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
MODELS = sorted(path.parent.name for path in (FIXTURES / "models").glob("*/config.json"))
GGUFS = sorted(path.stem for path in (FIXTURES / "gguf").glob("*.gguf"))
# Files without quantised blocks: their products take float32 activations, so they meet the tight bound.
PLAIN_GGUFS = [name for name in GGUFS if name.rsplit("_", 1)[1] in {"f32", "f16", "bf16", "factors"}]
ADAPTERS = sorted(path.parent.name for path in (FIXTURES / "adapters").glob("*/adapter_config.json"))
# (model, block type) of models that are quantised while they are paged in.
QUANTIZED = sorted(tuple(path.stem.rsplit(".", 1)) for path in (FIXTURES / "golden").glob("*.q?_0.json"))


def golden(name: str) -> dict[str, Any]:
    """The reference values of `MODEL`, `MODEL.q8_0` or `FILE.gguf`."""
    values: dict[str, Any] = json.loads((FIXTURES / "golden" / f"{name}.json").read_text())
    return values


def adapted_model(name: str) -> str:
    """The tiny model that an adapter is for."""
    config = json.loads((FIXTURES / "adapters" / name / "adapter_config.json").read_text())
    return Path(config["base_model_name_or_path"]).name


def model_path(name: str) -> Path:
    """The directory of a tiny model."""
    return FIXTURES / "models" / name


def gguf_path(name: str) -> Path:
    """A tiny GGUF file."""
    return FIXTURES / "gguf" / f"{name}.gguf"


def may_be_quantised(name: str) -> bool:
    """Whether a tiny model's digests name the type of their KV cache: those of GGUF files and quantised models."""
    return name.endswith((".gguf", "mxfp4"))


def path_of(name: str) -> Path:
    """A tiny model's path; the name of a GGUF file ends in .gguf."""
    return FIXTURES / ("gguf" if name.endswith(".gguf") else "models") / name
