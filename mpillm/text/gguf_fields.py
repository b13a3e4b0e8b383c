"""The fields tokenizer.ggml.* of a GGUF file, each checked for its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from mpillm.errors import ModelError

N = TypeVar("N", int, float)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
_UNSET = (-1, 2**32 - 1)  # LLAMA_TOKEN_NULL, signed and unsigned: there is no such token
# Fields that we do not use; some converters name tokens that do not exist.
_UNUSED = frozenset({"padding_token_id", "seperator_token_id"})


class TokenizerFields:
    """Values of tokenizer.ggml.* by their short names; a ModelError says that one is not of the kind asked for."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self.fields, self.where = fields, where

    def get(self, key: str) -> Any:
        return plain(self.fields.get(f"tokenizer.ggml.{key}"))

    def wrong(self, key: str, why: str) -> ModelError:
        return ModelError(f"tokenizer.ggml.{key} in {self.where} {why}.")

    def values(self, key: str) -> list[Any] | None:
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
            raise self.wrong(key, "is not a list")
        return list(value)

    def strings(self, key: str) -> list[str]:
        value = self.values(key)
        if value is None:
            raise self.wrong(key, "is missing")
        if not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "is not a list of strings")
        return value

    def numbers(self, key: str, number: Callable[[Any], N], count: int, default: N) -> list[N]:
        """Return a number for each of the `count` tokens."""
        value = self.values(key)
        if value is None:
            return [default] * count
        if len(value) != count:
            raise self.wrong(key, f"does not have one value for each of the {count} tokens")
        try:
            return [number(item) for item in value]
        except (TypeError, ValueError) as error:
            raise self.wrong(key, "contains something that is not a number") from error

    def id(self, key: str, count: int) -> int | None:
        value = self.get(key)
        if value is None or value in _UNSET:
            return None
        if key in _UNUSED and isinstance(value, int | np.integer) and not 0 <= value < count:
            return None
        if not isinstance(value, int | np.integer) or not 0 <= value < count:
            raise self.wrong(key, f"is {value}, but there are {count} tokens")
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        return default if value is None else bool(value)


def plain(value: Any) -> Any:
    """Return a value: itself, or the contents of a ReaderField of the gguf library."""
    return value.contents() if hasattr(value, "contents") else value
