"""Read from a model's files how texts become vectors: pooling, normalisation, prompts.

A directory says it as Sentence Transformers does: `modules.json` lists the modules, the directories of the pooling
module and of dense layers have a `config.json`, `config_sentence_transformers.json` has the prompts, and
`sentence_bert_config.json` the most tokens. A GGUF file says it by `pooling_type`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from mpillm.errors import ModelError
from mpillm.model.pooled import Dense, Function, Pooling
from mpillm.weights.formats.safetensors import read_header
from mpillm.weights.formats.stored import OWN, Floats
from mpillm.weights.io.mapped import MappedFile
from mpillm.weights.roles import Key
from mpillm.weights.source import Source
from mpillm.weights.text_files import LENGTHS, MODULES, PROMPTS, text_folder

GGUF_KEY = "pooling_type"  # a key of the configuration that is made from a GGUF file

_GGUF = {0: "mean", 1: "mean", 2: "cls", 3: "last", 4: "rank"}  # 0: it does not say
_FLAGS = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}
_NAMES = {"lasttoken": "last", "mean": "mean", "cls": "cls"}
_POOLINGS = ("mean", "last", "cls")
_FUNCTIONS: Mapping[str, Function] = {
    "Identity": "identity",
    "Tanh": "tanh",
    "ReLU": "relu",
    "GELU": "gelu",
    "SiLU": "silu",
}


@dataclass(frozen=True)
class EmbeddingSettings:
    """The settings in a model's files; without any, the mean of the hidden states at length 1."""

    pooling: Pooling = "mean"
    normalize: bool = True
    layers: tuple[Dense, ...] = ()  # what the pooled vector goes through
    prompts: Mapping[str, str] = field(default_factory=dict)  # what stands before a text, by name
    default_prompt: str | None = None  # a name
    max_tokens: int | None = None  # the maximum tokens of a text; None: as many as the model takes
    unsupported: str = ""  # what the model wants and does not get, if anything
    # Token ids: that a document is not relevant (if any), and that it is.
    answers: tuple[int | None, int] | None = None
    pools_prompts: bool = True  # whether a prompt's tokens are pooled like those of the text behind it

    @property
    def width(self) -> int | None:
        """Values of a vector; None: as many as a hidden state has."""
        return len(self.layers[-1].weight) if self.layers else None


def embedding_settings(source: Source) -> EmbeddingSettings:
    """Read the settings of a model for embeddings; ModelError if they cannot be read."""
    folder = text_folder(source.tokenizer)
    if folder is not None and (folder / MODULES).exists():
        return _from_directory(folder)
    pooling = _GGUF.get(source.config.get(GGUF_KEY, 0), "unknown")
    if pooling not in _POOLINGS:
        return EmbeddingSettings(unsupported=f"pooling {pooling!r}")
    layers = [
        Dense(source.read_f32(key)) for key in (Key("dense_2"), Key("dense_3")) if key in source.tensors
    ]
    return EmbeddingSettings(cast(Pooling, pooling), layers=tuple(layers))


def answer_words(source: Source, pair_template: str | None, asked: list[str], has_ids: bool) -> list[str]:
    """Return the words with which a model says whether a document is relevant: those `asked` for, or its files' own.

    None are needed where its files say it in ids (`has_ids`).
    """
    words = asked or source.config.get("classifier_from_token") or []
    if not words and not has_ids and pair_template is not None and _is_reranker(source.path):
        return ["no", "yes"]
    return words


def has_answer_ids(source: Source) -> bool:
    """Return whether a model's files name tokens that say whether a document is relevant."""
    folder = text_folder(source.tokenizer)
    if folder is None or not (folder / MODULES).exists():
        return False
    return any(_kind(module) == "LogitScore" for module in _modules(folder))


def _is_reranker(path: Path) -> bool:
    """Return whether a model is called Qwen3-Reranker, whose published files say it nowhere else.

    In the cache of huggingface_hub the name is that of the directory above `snapshots`.
    """
    return any("qwen3-reranker" in name.lower() for name in (path.name, path.parent.parent.name))


def _modules(folder: Path) -> list[dict[str, Any]]:
    modules = _read(folder / MODULES)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelError(f"{folder / MODULES} is not a list of modules.")
    return modules


def _kind(module: dict[str, Any]) -> str:
    return str(module.get("type", "")).rpartition(".")[2]


def _from_directory(folder: Path) -> EmbeddingSettings:
    modules = _modules(folder)
    prompts, lengths = (
        _read(folder / name) if (folder / name).exists() else {} for name in (PROMPTS, LENGTHS)
    )
    pooling, normalize, unsupported = "mean", False, ""
    layers: list[Dense] = []
    answers, pools_prompts = None, True
    for module in modules:
        kind, path = _kind(module), folder / str(module.get("path", ""))
        if kind == "Pooling":
            config = _read(path / "config.json")
            pooling, pools_prompts = _pooling(config), config.get("include_prompt") is not False
        elif kind == "Normalize":
            normalize = True
        elif kind == "Dense" and not normalize:
            layers.append(_dense(path))
        elif kind == "LogitScore":
            answers = _answers(_read(path / "config.json"), path)
        elif kind != "Transformer":
            unsupported = f"the module {kind or module}"
    if pooling not in _POOLINGS:
        pooling, unsupported = "mean", f"pooling {pooling!r}"
    named = {str(name): str(text) for name, text in (prompts.get("prompts") or {}).items()}
    default = prompts.get("default_prompt_name")
    return EmbeddingSettings(
        cast(Pooling, pooling),
        normalize,
        tuple(layers),
        named,
        default if default in named else None,
        _max_tokens(lengths, folder),
        unsupported,
        answers,
        pools_prompts,
    )


def _max_tokens(lengths: Any, folder: Path) -> int | None:
    """Return the maximum of tokens of a text, if a file says it."""
    maximum = lengths.get("max_seq_length") if isinstance(lengths, dict) else lengths
    if maximum is not None and (type(maximum) is not int or maximum < 1):
        raise ModelError(
            f"{folder / LENGTHS}: max_seq_length is {str(maximum)[:40]}, but must be at least 1."
        )
    return maximum


def _answers(config: Mapping[str, Any], path: Path) -> tuple[int | None, int]:
    """Return the tokens by which a model answers whether a document is relevant."""
    no, yes = config.get("false_token_id"), config.get("true_token_id")
    if type(yes) is not int or not (no is None or type(no) is int):
        raise ModelError(f"{path / 'config.json'} names no answer tokens (true_token_id, false_token_id).")
    return no, yes


def _dense(path: Path) -> Dense:
    """Return a dense layer of Sentence Transformers."""
    config = _read(path / "config.json")
    named = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if named not in _FUNCTIONS:
        raise ModelError(
            f"{path / 'config.json'}: activation_function {named!r} is not supported, but {', '.join(_FUNCTIONS)}."
        )
    file = MappedFile(path / "model.safetensors")
    try:
        tensors = read_header(file)
        found: dict[str, Floats] = {}
        for name, tensor in tensors.items():
            if tensor.dtype not in OWN:
                raise ModelError(
                    f"{file.path}: tensor {name} has dtype {tensor.dtype}, which is not supported."
                )
            raw = file.view(tensor.offset, tensor.nbytes).reshape(
                -1, tensor.nbytes // (tensor.shape or (1,))[0]
            )
            values = OWN[tensor.dtype].decode(raw, (*tensor.shape, 1)[1], threads=1)
            if not np.isfinite(values).all():
                raise ModelError(
                    f"{file.path}: tensor {name} has values that are not finite (NaN or infinity); fetch or convert "
                    "the model again."
                )
            found[name.removeprefix("linear.")] = values.reshape(tensor.shape).copy()
    finally:
        file.close()
    weight, bias = found.get("weight"), found.get("bias")
    if weight is None or weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise ModelError(f"{file.path} has no matrix of a dense layer (linear.weight).")
    return Dense(weight, bias, _FUNCTIONS[named])


def _pooling(config: Mapping[str, Any]) -> str:
    """Return the one way of pooling that a configuration switches on, or a name that says what it wants instead."""
    if "pooling_mode" in config:
        return _NAMES.get(config["pooling_mode"], str(config["pooling_mode"]))
    on = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    if len(on) == 1:
        return _FLAGS.get(on[0], on[0].removeprefix("pooling_mode_"))
    return " and ".join(key.removeprefix("pooling_mode_") for key in on) or "none"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}.") from None
