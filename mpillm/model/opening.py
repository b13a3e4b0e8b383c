"""Opening a model: its source, and the configuration that its family reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpillm.model.config import ModelConfig
from mpillm.model.families import family_of, gguf_family, read_config
from mpillm.model.families.base import Family
from mpillm.weights import opening
from mpillm.weights.formats.quantised import QUANTIZATION, method_of
from mpillm.weights.formats.tensors import TensorSource
from mpillm.weights.source import Source, check_tensors, column_unit


class _Families:
    def of_config(self, config: Mapping[str, Any], name: str) -> Family:
        judge(config, name)
        return family_of(config, name)[0]

    def of_gguf(self, kind: Any, name: str) -> Family:
        return gguf_family(kind, name)


def judge(config: Mapping[str, Any], name: str) -> None:
    """ModelError unless a model with this config.json can be run, as far as that says; tensors are not looked at."""
    read_config({key: value for key, value in config.items() if key != QUANTIZATION}, name)
    method_of(config.get(QUANTIZATION), name)


def open_source(path: str | Path, quantize: str = "none") -> Source:
    """Open a model of any family (see `weights.opening.open_source`)."""
    return opening.open_source(path, _Families(), quantize)


def open_unpacked(path: str | Path, quantize: str = "none") -> TensorSource:
    """The same for a model that is not packed (see `weights.opening.open_unpacked`)."""
    return opening.open_unpacked(path, _Families(), quantize)


def config_of(source: Source) -> ModelConfig:
    """The configuration of an opened model, whose tensors are found to be complete; else a ModelError."""
    config = read_config(source.config, str(source.path)).with_block(column_unit(source))
    check_tensors(source, config)
    return config
