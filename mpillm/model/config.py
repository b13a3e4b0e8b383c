"""A model's configuration: all that the decoder needs to know of a model besides its weights, as frozen data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

from mpillm.model.cache_spec import LayerCache
from mpillm.model.layers.attention import AttentionSpec
from mpillm.model.layers.norm import NormSpec
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.pooled import ClassifierSpec
from mpillm.partition.grid import Place, vocab_axis
from mpillm.weights.inventory import HEAD, PageSpec, TensorSpec
from mpillm.weights.roles import Key


class Beside(Protocol):
    """The adapters that ranks hold besides the model's own weights."""

    def nbytes(self, place: Place) -> int:
        """Return bytes of it on the rank at `place`."""

    def row_nbytes(self, place: Place) -> int:
        """Return bytes that a row of a step takes for it there, at most."""


@dataclass(frozen=True)
class ModelConfig:
    """A model as its family reads it from `config.json` or a GGUF file's metadata; an `Inventory` of tensors.

    Embeddings are multiplied by `embedding_scale`, logits by `logit_scale`; `logit_softcap` c > 0 makes a logit x
    c tanh(x / c). `head_bias`: the LM head has a bias. `block` is the block size of weights that are cut by columns
    (see `grid.axis` and `column_unit`). A model that does not generate has no LM head, and may have a `classifier` of
    pooled hidden states.
    """

    architecture: str
    hidden: int
    vocab: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec | None
    max_position: int
    short_length: int = 0  # sequences of more tokens have LongRoPE's long factors; 0: it has no LongRoPE
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    head_bias: bool = False
    block: int = 1
    generates: bool = True
    classifier: ClassifierSpec | None = None
    pair_template: str | None = field(default=None, compare=False)  # for rerankers
    adapters: Beside | None = field(default=None, compare=False)
    # Unknown keys of the configuration.
    ignored_keys: tuple[str, ...] = field(default=(), compare=False)

    def adapters_nbytes(self, place: Place) -> int:
        """Return bytes of its adapters on the rank at `place`."""
        return self.adapters.nbytes(place) if self.adapters else 0

    def with_block(self, block: int) -> ModelConfig:
        """Return this configuration for weights of this block size."""
        return replace(self, block=block)

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return len(self.layers)

    @cached_property
    def max_shards(self) -> int:
        """The most shards that leave none without a panel of something: a power of two."""
        axes = {axis for layer in set(self.layers) for axis in layer.axes(self.block)}
        return min(axis.panels for axis in (vocab_axis(self.vocab), *axes))

    @property
    def whole_prompts(self) -> bool:
        """Whether tokens attend to later ones, so that a step needs all of a prompt."""
        mixers = {layer.mixer for layer in self.layers}
        return any(isinstance(mixer, AttentionSpec) and mixer.bidirectional for mixer in mixers)

    @property
    def expert_share(self) -> float:
        """The part of a layer's experts that a token goes to, at most; 1 without experts."""
        return min((layer.mlp.share for layer in set(self.layers) if layer.mlp), default=1.0)

    def pages(self, layer: int) -> Sequence[PageSpec]:
        """Return a layer's pages that every step uses, in the order of use."""
        return tuple(self.layers[layer].pages(layer, self.hidden, self.block))

    def experts(self, layer: int) -> Sequence[PageSpec]:
        """Return a layer's experts, a page each; empty if it has none."""
        return self.layers[layer].experts(layer, self.hidden, self.block)

    @property
    def embed(self) -> TensorSpec:
        """The table of embeddings."""
        return TensorSpec(Key("embed"), (self.vocab, self.hidden))

    @property
    def head(self) -> PageSpec:
        """The final norm, if there is one, and the LM head if the model generates."""
        norm = tuple(self.final_norm.tensors("final_norm", -1, self.hidden)) if self.final_norm else ()
        if not self.generates:
            return PageSpec(HEAD, norm)
        rows = vocab_axis(self.vocab)
        bias = [TensorSpec(Key("head_bias"), (self.vocab,), rows)] if self.head_bias else []
        return PageSpec(HEAD, (*norm, *bias, TensorSpec(Key("head"), (self.vocab, self.hidden), rows)))

    @property
    def pooled(self) -> Sequence[TensorSpec]:
        """The tensors after pooling."""
        return () if self.classifier is None else tuple(self.classifier.tensors(self.hidden))

    def cache(self, place: Place) -> list[tuple[LayerCache, ...]]:
        """Return the parts of a sequence that each layer of the model keeps on the rank at `place`."""
        kinds = {layer: layer.cache(place, self.block) for layer in set(self.layers)}
        return [kinds[layer] for layer in self.layers]
