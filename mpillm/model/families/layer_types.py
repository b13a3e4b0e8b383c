"""Reads which layers attend to a window, from a configuration."""

from __future__ import annotations

from collections.abc import Sequence

from mpillm.errors import ModelError
from mpillm.model.fields import Fields
from mpillm.model.rope_fields import LONGEST

FULL, SLIDING = "full_attention", "sliding_attention"  # values of layer_types


def read_layer_types(
    fields: Fields, n_layers: int, *supported: str, key: str = "layer_types"
) -> Sequence[str] | None:
    """Return the names in layer_types, one for each layer; None if the key is absent."""
    types = fields.raw(key)
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != n_layers:
        raise fields.fail(key, f"but must be a list of {n_layers} names, one per layer")
    unknown = [kind for kind in types if kind not in supported]
    if unknown:
        raise ModelError(f"{fields.name}: layer type {str(unknown[0])[:60]!r} in {key} is not supported.")
    return types


def every_nth_full(n_layers: int, every: int) -> list[str]:
    """layer_types of a model in which every n-th layer has no window."""
    return [SLIDING if (layer + 1) % every else FULL for layer in range(n_layers)]


def read_window_types(fields: Fields, n_layers: int, every: int) -> list[str]:
    """layer_types, or what sliding_window_pattern says (`every` if it is absent): every n-th layer has no window."""
    every = fields.integer("sliding_window_pattern", 1, LONGEST, default=every)
    fields.raw("_sliding_window_pattern")
    return list(read_layer_types(fields, n_layers, FULL, SLIDING) or every_nth_full(n_layers, every))


def read_windows(
    fields: Fields, architecture: str, n_layers: int, window: int, first: int, some: bool
) -> tuple[int, ...]:
    """Return each layer's sliding window, 0 if none: `window` from layer `first` on, or as layer_types says.

    `some`: the architecture may have windows in some layers only.
    """
    types = read_layer_types(fields, n_layers, FULL, SLIDING)
    if types is None:
        return tuple(window if layer >= first else 0 for layer in range(n_layers))
    if SLIDING in types and not window:
        raise ModelError(
            f"{fields.name}: layer_types has sliding_attention, but no sliding_window is in use."
        )
    if window and not some and FULL in types:
        raise ModelError(
            f"{fields.name}: layer_types has full_attention, but {architecture} has windows in all layers."
        )
    return tuple(window if kind == SLIDING else 0 for kind in types)
