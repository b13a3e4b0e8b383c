"""Weights that are NaN or infinite: a damaged file, or one that was not converted well."""

from __future__ import annotations

import numpy as np

from mpillm.errors import ModelError
from mpillm.weights.inventory import tensor_name
from mpillm.weights.roles import Key
from mpillm.weights.source import Source


def check_vectors(source: Source) -> None:
    """Raise ModelError if a norm or a bias has a value that is not finite: then no answer means anything."""
    for key, info in source.tensors.items():
        if len(info.shape) == 1 and not _is_finite(source, key):
            raise ModelError(
                f"{source.path}: {tensor_name(key)} has values that are not finite (NaN or infinity); fetch or convert "
                "the model again."
            )


def first_not_finite(source: Source) -> Key | None:
    """Return the first tensor that has a value that is not finite, None if there is none. Reads the whole model."""
    return next((key for key in source.tensors if not _is_finite(source, key)), None)


def _is_finite(source: Source, key: Key) -> bool:
    return all(np.isfinite(numbers).all() for numbers in source.floats(key))
