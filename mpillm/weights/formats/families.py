"""What the formats ask of the families of models: which one a file is of, and what its tensors are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from mpillm.weights.formats.gguf_family import GgufFamily


class Families(Protocol):
    """The table of families; `name` is what messages call the file. ModelError if there is none."""

    def of_config(self, config: Mapping[str, Any], name: str) -> GgufFamily:
        """The family of a configuration with Hugging Face's keys."""

    def of_gguf(self, kind: Any, name: str) -> GgufFamily:
        """The family of a GGUF file by its general.architecture."""
