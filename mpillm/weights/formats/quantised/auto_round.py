"""AutoRound's own checkpoints: those of other methods, named by `packing_format`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from mpillm.errors import ModelError
from mpillm.weights.formats.extent import Recipe
from mpillm.weights.formats.quantised.base import Method
from mpillm.weights.formats.quantised.compressed import CompressedMethod
from mpillm.weights.formats.quantised.float8 import Float8Method
from mpillm.weights.formats.quantised.gptq import AwqMethod, GptqMethod
from mpillm.weights.formats.recipes import Raw


class TrueZeros(GptqMethod):
    """As `gptq`, with zeros as they are."""

    def less_one(self) -> bool:
        return False


class AutoRoundMethod(Method):
    """`auto-round`: GPTQ (zeros as they are, or less 1), AWQ, FP8 or what llm-compressor writes."""

    formats: ClassVar[dict[str, type[Method]]] = {
        "auto_round": TrueZeros,
        "auto_round:gptqmodel": TrueZeros,
        "auto_round:auto_gptq": GptqMethod,
        "auto_round:auto_awq": AwqMethod,
        "auto_round:fp8": Float8Method,
        "auto_round:llm_compressor": CompressedMethod,
    }

    def take(self, tensors: dict[str, Raw]) -> Iterator[tuple[str, Recipe]]:
        found = self.config.get("packing_format")
        if not isinstance(found, str) or found not in self.formats:
            raise ModelError(
                f"{self.path}: auto-round with packing_format {str(found)[:40]!r} is not supported; "
                f"supported: {', '.join(self.formats)}."
            )
        if self.config.get("rotation_config"):
            raise ModelError(f"{self.path}: rotation_config of auto-round is not supported.")
        config = self.config
        if found == "auto_round:auto_awq":  # zeros are there in any case
            config = {**config, "zero_point": not config.get("sym", True)}
        yield from self.formats[found](config, self.path).take(tensors)
