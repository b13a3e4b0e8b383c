"""The interface between formats and families of models: the family of a file, and the names of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from mpillm.weights.formats.gguf_family import GgufFamily


class Families(Protocol):
    """The table of families; `name` is what messages call the file. ModelError if there is none."""

    def of_config(self, config: Mapping[str, Any], name: str) -> GgufFamily:
        """Return the family of a configuration with Hugging Face's keys."""

    def of_gguf(self, kind: Any, name: str) -> GgufFamily:
        """Return the family of a GGUF file by its general.architecture."""
