"""Opening a model: its source, and the configuration that its family reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpillm.errors import JobError
from mpillm.model.config import ModelConfig
from mpillm.model.families import family_of, gguf_family, read_config
from mpillm.model.families.base import Family
from mpillm.weights import opening
from mpillm.weights.formats.hf import read_config as read_files
from mpillm.weights.formats.paper import PaperSource
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
    """Raise ModelError unless a model with this config.json can be run, as far as that says, without its tensors."""
    read_config(_without_method(config), name)
    method_of(config.get(QUANTIZATION), name)


def open_source(path: str | Path, quantize: str = "none", again: bool = False) -> Source:
    """Open a model of any family (see `weights.opening.open_source`).

    JobError if `quantize` is asked of what is quantised already; `again`: it is, for a draft model.
    """
    return _checked(opening.open_source(path, _Families(), quantize), quantize, again)


def open_unpacked(path: str | Path, quantize: str = "none") -> TensorSource:
    """Open a model of any family that is not packed (see `weights.opening.open_unpacked`)."""
    return opening.open_unpacked(path, _Families(), quantize)


def open_described(path: Path, quantize: str, again: bool = False) -> Source:
    """Open a model for a plan: a directory with nothing but a config.json will do, or the header of a GGUF file."""
    if path.suffix.lower() == ".gguf" and path.is_file():
        from mpillm.weights.formats.gguf_file import open_gguf

        return _checked(open_gguf(path, _Families(), quantize, whole=False), quantize, again)
    if not path.is_dir() or _has_weights(path):
        return open_source(path, quantize, again)
    config, _ = read_files(path)
    return PaperSource(path, config, read_config(_without_method(config), str(path)), quantize)


def _checked(source: Source, quantize: str, again: bool) -> Source:
    if isinstance(source, TensorSource) and not again:
        try:
            source.check_unquantised(quantize)
        except JobError:
            source.close()
            raise
    return source


def _has_weights(path: Path) -> bool:
    return any(
        next(path.glob(pattern), None)
        for pattern in ("*.safetensors", "*.safetensors.index.json", "*.gguf", "*.m")
    )


def _without_method(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != QUANTIZATION}


def config_of(source: Source) -> ModelConfig:
    """Return the configuration of an opened model, whose tensors are found to be complete; else a ModelError."""
    config = read_config(source.config, str(source.path)).with_block(column_unit(source))
    check_tensors(source, config)
    return config
