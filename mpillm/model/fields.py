"""Reading a model's configuration key by key: each value's type and range is checked, and what nobody read is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mpillm.errors import ModelError


class Fields:
    """A configuration dict whose keys are ticked off as they are read.

    `name` is how messages call the dict, `defaults` what absent keys mean for this architecture. A key whose value
    is null counts as absent where `null` is not a value of its own.
    """

    def __init__(
        self, values: Mapping[str, Any], name: str, defaults: Mapping[str, Any] | None = None
    ) -> None:
        self.values = values
        self.name = name
        self.defaults = defaults or {}
        self.read: set[str] = set()

    def fail(self, key: str, problem: str) -> ModelError:
        """Return the error that says what is wrong with a key's value."""
        shown = repr(self.values.get(key))
        if len(shown) > 60:
            shown = shown[:57] + "..."
        return ModelError(f"{self.name}: {key} is {shown}, {problem}.")

    def raw(self, key: str) -> Any:
        """Return the value, ticked off, with the architecture's default if the key is absent; None if there is none."""
        self.read.add(key)
        return self.values[key] if key in self.values else self.defaults.get(key)

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """Return a whole number within [low, high]; without a default the key must be there."""
        value = self.optional_integer(key, low, high)
        if value is None:
            value = default
        if value is None:
            raise ModelError(
                f"{self.name}: {key} is missing; it must be a whole number from {low} to {high}."
            )
        return value

    def optional_integer(self, key: str, low: int, high: int) -> int | None:
        """Return a whole number within [low, high], or None where the key is absent or null."""
        value = self.raw(key)
        if value is None:
            return None
        if type(value) is not int or not low <= value <= high:
            raise self.fail(key, f"but must be a whole number from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """Return a finite number within [low, high]; without a default the key must be there."""
        value = self.optional_number(key, low, high)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.name}: {key} is missing; it must be a number from {low:g} to {high:g}.")
        return value

    def optional_number(self, key: str, low: float, high: float) -> float | None:
        """Return a finite number within [low, high], or None where the key is absent or null."""
        value = self.raw(key)
        if value is None:
            return None
        # Compared before converted: a whole number beyond the range of floats must not overflow.
        if type(value) not in {int, float} or not low <= value <= high or not math.isfinite(value):
            raise self.fail(key, f"but must be a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, "but must be true or false")
        return value

    def one_of(self, key: str, choices: tuple[str, ...], default: str) -> str:
        """Return one of a few words."""
        value = self.raw(key)
        if value is None:
            return default
        if value not in choices:
            raise self.fail(key, f"but only {' or '.join(choices)} is supported")
        return str(value)

    def table(self, key: str) -> Mapping[str, Any]:
        """Return a nested dict; empty where the key is absent or null."""
        value = self.raw(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise self.fail(key, "but must be a table of named values")
        return value

    def integers(self, key: str, low: int, high: int) -> tuple[int, ...]:
        """Return a list of whole numbers, or a single one, as a tuple; empty where the key is absent or null."""
        value = self.raw(key)
        if value is None:
            return ()
        items = value if isinstance(value, list) else [value]
        if not all(type(item) is int and low <= item <= high for item in items):
            raise self.fail(key, f"but must be whole numbers from {low} to {high}")
        return tuple(items)

    def unread(self) -> dict[str, Any]:
        """Return the fields that nothing has read."""
        return {key: value for key, value in self.values.items() if key not in self.read}
