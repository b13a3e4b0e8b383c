"""The layers after pooling: small matrices that make scores, or another vector, from one pooled hidden state.

Rank 0 reads them; `mpillm.engine.pooled` computes with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mpillm import kernels
from mpillm.model.layers.norm import NormSpec
from mpillm.weights.inventory import TensorSpec
from mpillm.weights.roles import Key
from mpillm.weights.source import Source

Floats = NDArray[np.float32]
Function = Literal["identity", "tanh", "relu", "gelu", "gelu_tanh", "silu"]
Decision = Literal["softmax", "sigmoid", "identity"]
Pooling = Literal["mean", "last", "cls"]


@dataclass(frozen=True)
class DenseSpec:
    """norm(f(W x + b)) of `width` values; the roles of its tensors begin with `role`."""

    role: str
    width: int
    bias: bool = False
    function: Function = "identity"
    norm: NormSpec | None = None

    def tensors(self, inputs: int) -> Iterator[TensorSpec]:
        """Yield the tensors of the layer, which takes vectors of `inputs` values."""
        yield TensorSpec(Key(self.role), (self.width, inputs))
        if self.bias:
            yield TensorSpec(Key(f"{self.role}_bias"), (self.width,))
        if self.norm:
            yield from self.norm.tensors(f"{self.role}_norm", -1, self.width)


@dataclass(frozen=True)
class ClassifierSpec:
    """A classifier: what is pooled, the layers that make a logit for each of `labels`, and what logits become."""

    pooling: Pooling
    layers: tuple[DenseSpec, ...]
    labels: tuple[str, ...]
    decision: Decision

    def tensors(self, hidden: int) -> Iterator[TensorSpec]:
        """Yield the tensors of all layers."""
        for layer in self.layers:
            yield from layer.tensors(hidden)
            hidden = layer.width


@dataclass(frozen=True, eq=False)
class Dense:
    """A dense layer with its weights: f32 [n, k], [n] and those of the norm [n]."""

    weight: Floats
    bias: Floats | None = None
    function: Function = "identity"
    norm: kernels.Norm | None = None


@dataclass(frozen=True, eq=False)
class Classifier:
    """A classifier with its weights."""

    pooling: Pooling
    layers: tuple[Dense, ...]
    labels: tuple[str, ...]
    decision: Decision

    @property
    def relevant(self) -> int | None:
        """The label that says that a document answers a query: the only one, or "yes"; None if there is none."""
        if len(self.labels) == 1:
            return 0
        names = [label.strip().lower() for label in self.labels]
        return names.index("yes") if len(names) == 2 and "yes" in names else None


def read_classifier(source: Source, spec: ClassifierSpec) -> Classifier:
    """Return the classifier of a model's own tensors."""

    def vector(role: str, there: bool) -> Floats | None:
        return source.read_f32(Key(role)) if there else None

    layers = []
    for layer in spec.layers:
        norm = None
        if layer.norm is not None:
            weight = source.read_f32(Key(f"{layer.role}_norm"))
            bias = vector(f"{layer.role}_norm_bias", layer.norm.bias)
            norm = kernels.Norm(layer.width, layer.norm.eps, weight, bias, layer.norm.centred)
        weight = source.read_f32(Key(layer.role))
        layers.append(Dense(weight, vector(f"{layer.role}_bias", layer.bias), layer.function, norm))
    return Classifier(spec.pooling, tuple(layers), spec.labels, spec.decision)


def answers_classifier(source: Source, no: int | None, yes: int) -> Classifier:
    """Return the classifier of a model that answers in words: rows of its LM head, of the last token's hidden state."""
    ids = [yes] if no is None else [no, yes]
    weight = source.read_f32(Key("head"), np.array(ids))
    labels = ("yes",) if no is None else ("no", "yes")
    return Classifier("last", (Dense(weight),), labels, "sigmoid" if no is None else "softmax")
