"""How a model's files say that texts become vectors: pooling, normalisation, prompts.

A directory says it as Sentence Transformers does: `modules.json` lists the modules, the pooling module's directory
has a `config.json`, and `config_sentence_transformers.json` has the prompts. A GGUF file says it by `pooling_type`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from mpillm.errors import ModelError
from mpillm.weights.source import Source
from mpillm.weights.text_files import MODULES, PROMPTS

GGUF_KEY = "pooling_type"  # of the configuration that is made of a GGUF file

_GGUF = {0: "mean", 1: "mean", 2: "cls", 3: "last", 4: "rank"}  # 0: it does not say
_FLAGS = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}
_NAMES = {"lasttoken": "last", "mean": "mean", "cls": "cls"}


@dataclass(frozen=True)
class EmbeddingSettings:
    """What a model's files say; without any, the mean of the hidden states at length 1."""

    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)  # what stands before a text, by name
    default_prompt: str | None = None  # a name
    unsupported: str = ""  # what the model wants and does not get, if anything


def embedding_settings(source: Source) -> EmbeddingSettings:
    """What the files of a model say about embeddings; ModelError if they cannot be read."""
    if isinstance(source.tokenizer, Path) and (source.tokenizer / MODULES).exists():
        return _from_directory(source.tokenizer)
    pooling = _GGUF.get(source.config.get(GGUF_KEY, 0), "unknown")
    if pooling not in ("mean", "last"):
        return EmbeddingSettings(unsupported=f"pooling {pooling!r}")
    return EmbeddingSettings(cast(Literal["mean", "last"], pooling))


def _from_directory(folder: Path) -> EmbeddingSettings:
    modules = _read(folder / MODULES)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelError(f"{folder / MODULES} is no list of modules.")
    prompts = _read(folder / PROMPTS) if (folder / PROMPTS).exists() else {}
    pooling, normalize, unsupported = "mean", False, ""
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            pooling = _pooling(_read(folder / str(module.get("path", "")) / "config.json"))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            unsupported = f"the module {kind or module}"
    if pooling not in ("mean", "last"):
        pooling, unsupported = "mean", f"pooling {pooling!r}"
    named = {str(name): str(text) for name, text in (prompts.get("prompts") or {}).items()}
    default = prompts.get("default_prompt_name")
    return EmbeddingSettings(
        cast(Literal["mean", "last"], pooling),
        normalize,
        named,
        default if default in named else None,
        unsupported,
    )


def _pooling(config: Mapping[str, Any]) -> str:
    """The one way of pooling that a configuration switches on, or a name that says what it wants instead."""
    if "pooling_mode" in config:
        return _NAMES.get(config["pooling_mode"], str(config["pooling_mode"]))
    on = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    if len(on) == 1:
        return _FLAGS.get(on[0], on[0].removeprefix("pooling_mode_"))
    return " and ".join(key.removeprefix("pooling_mode_") for key in on) or "none"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}.") from None
