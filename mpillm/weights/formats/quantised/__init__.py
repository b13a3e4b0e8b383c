"""Quantised Hugging Face checkpoints: what their tensors stand for, by the method that quantization_config names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mpillm.errors import ModelError
from mpillm.weights.formats.extent import Recipe
from mpillm.weights.formats.quantised.auto_round import AutoRoundMethod
from mpillm.weights.formats.quantised.base import Method
from mpillm.weights.formats.quantised.compressed import CompressedMethod
from mpillm.weights.formats.quantised.float4 import BitsAndBytesMethod, ModelOptMethod
from mpillm.weights.formats.quantised.float8 import Float8Method
from mpillm.weights.formats.quantised.gptq import AwqMethod, GptqMethod
from mpillm.weights.formats.quantised.mxfp4 import Mxfp4Method
from mpillm.weights.formats.quantised.quark import QuarkMethod
from mpillm.weights.formats.recipes import Raw

QUANTIZATION = "quantization_config"
METHODS: dict[str, type[Method]] = {
    "auto-round": AutoRoundMethod,
    "awq": AwqMethod,
    "bitsandbytes": BitsAndBytesMethod,
    "compressed-tensors": CompressedMethod,
    "fbgemm_fp8": Float8Method,
    "fp8": Float8Method,
    "gptq": GptqMethod,
    "modelopt": ModelOptMethod,
    "mxfp4": Mxfp4Method,
    "mxfp8": Float8Method,
    "quark": QuarkMethod,
}


class _None:
    """The method of a checkpoint that is not quantised."""

    def take(self, tensors: dict[str, Raw]) -> Iterator[tuple[str, Recipe]]:
        """Take nothing."""
        yield from ()


def method_of(config: Any, path: str | Path) -> Method | _None:
    """Return the method of a checkpoint; ModelError if it is not supported, before any tensor is read.

    `path` is what messages call the checkpoint.
    """
    if config is None or config == {}:
        return _None()
    name = config.get("quant_method") if isinstance(config, Mapping) else None
    if not isinstance(name, str) or name not in METHODS:
        unsupported = f"has quant_method {str(name)[:60]!r}, which is not supported"
        wrong = "names no quant_method" if name is None else unsupported
        raise ModelError(f"{path}: {QUANTIZATION} {wrong}; supported are {', '.join(METHODS)}.")
    return METHODS[name](config, path)
