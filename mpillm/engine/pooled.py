"""The layers after pooling: rank 0 computes scores or an embedding from a pooled hidden state.

The result is float32, with bits that depend neither on the batch nor on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from mpillm import kernels
from mpillm.engine import exact
from mpillm.errors import NotFiniteError
from mpillm.kernels.types import Activation, BlockType
from mpillm.model.pooled import Classifier, Dense, Function
from mpillm.weights.page import Matrix

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

_KERNELS = {"gelu": Activation.GELU, "gelu_tanh": Activation.GELU_TANH, "silu": Activation.SILU}


def through(layers: Sequence[Dense], x: Floats) -> Floats:
    """Apply the layers in turn to x [k]; raises NotFiniteError if a result is NaN or infinite."""
    for layer in layers:
        x = _dense(layer, x)
        if not np.isfinite(x).all():
            raise NotFiniteError
    return x


def logits_of(classifier: Classifier, pooled: Floats) -> Floats:
    """Return the logits, f32 [labels], of a pooled hidden state [hidden]; raises NotFiniteError."""
    return through(classifier.layers, pooled)


def decide(classifier: Classifier, logits: Floats, activated: bool = True) -> Doubles:
    """Return the scores, f64 [labels]: logits [labels] after the model's activation, if `activated`."""
    x = logits.astype(np.float64)
    if not activated or classifier.decision == "identity":
        return x
    if classifier.decision == "sigmoid":
        small = exact.exp(-np.abs(x))
        return np.asarray(np.where(x < 0, small, 1.0) / (1.0 + small))
    weights = exact.exp(x - x.max())
    return np.asarray(weights / np.cumsum(weights)[-1])


def relevance(classifier: Classifier, logits: Floats, activated: bool = True) -> float:
    """Return a document's relevance from logits [labels]; with two labels and no activation it is their difference."""
    at = classifier.relevant
    assert at is not None
    if len(classifier.labels) == 2 and not (activated and classifier.decision != "identity"):
        return float(logits[at]) - float(logits[1 - at])
    return float(decide(classifier, logits, activated)[at])


def _dense(layer: Dense, x: Floats) -> Floats:
    n, k = layer.weight.shape
    weight = layer.weight.reshape(-1).view(np.uint8)
    matrix = Matrix(BlockType.F32, n, k, np.array([0, k], np.int32), weight, row_bytes=4 * k)
    out = np.empty((1, n), np.float32)
    kernels.compute(kernels.Products(matrix), np.ascontiguousarray(x[None]), [out], 1)
    if layer.bias is not None:
        out += layer.bias
    out = _apply(layer.function, out)
    if layer.norm is not None:
        normed = np.empty_like(out)
        kernels.layer_norm(out, layer.norm.weight, layer.norm.bias, layer.norm.eps, normed, 1)
        out = normed
    return cast(Floats, out[0])


def _apply(function: Function, x: Floats) -> Floats:
    if function == "identity":
        return x
    if function == "relu":
        return cast(Floats, np.maximum(x, np.float32(0)))
    if function == "tanh":
        wide = x.astype(np.float64)
        small = exact.exp(-2.0 * np.abs(wide))
        return cast(Floats, (np.sign(wide) * (1.0 - small) / (1.0 + small)).astype(np.float32))
    out = np.empty(x.shape, np.float32)
    kernels.activate(_KERNELS[function], x, None, out, 1)
    return out
