"""A layer as data: a token mixer, a feed-forward part, and the norms around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mpillm.model.cache_spec import LayerCache
from mpillm.model.layers.attention import AttentionSpec
from mpillm.model.layers.entry import EntrySpec
from mpillm.model.layers.experts import ExpertsSpec
from mpillm.model.layers.mixer import Mixer
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.partition.grid import Axis, Place
from mpillm.weights.inventory import ATTENTION, PageSpec, TensorSpec
from mpillm.weights.roles import Key


@dataclass(frozen=True)
class LayerSpec:
    """x += residual_scale * mixer(x), then x += residual_scale * mlp_scale * mlp(x), each with the norms around it.

    `parallel`: both are of x before either is added, and the MLP has a norm of its own before it or the mixer's.
    `scaled`: what leaves the layer is multiplied by a learned number.
    `entry`: what is done to embeddings before they enter it.
    A layer may have a mixer or an MLP alone; without a mixer it is `parallel`.
    """

    mixer: Mixer | None
    mlp: MlpSpec | ExpertsSpec | None
    mixer_norms: Norms
    mlp_norms: Norms
    residual_scale: float = 1.0
    parallel: bool = False
    scaled: bool = False
    entry: EntrySpec | None = None
    mlp_scale: float = 1.0

    def __post_init__(self) -> None:
        assert self.mixer or (self.mlp and self.parallel), self

    @property
    def parts(self) -> tuple[Mixer | MlpSpec | ExpertsSpec, ...]:
        """The parts of the layer: its mixer and its MLP, or only one of them."""
        return tuple(part for part in (self.mixer, self.mlp) if part)

    def stackable(self, place: Place) -> bool:
        """Return whether it may be part of a `kernels.LayerStack`: shards exchange nothing inside its parts."""
        whole = len(self.parts) == 2 and all(part.fused for part in self.parts)
        if isinstance(self.mixer, AttentionSpec) and self.mixer.norms_shards(place):
            return False
        sums = self.mixer_norms.of_sum or self.mlp_norms.of_sum
        return whole and not (self.parallel or self.scaled or self.entry or sums)

    def axes(self, block: int) -> Iterator[Axis]:
        """Yield the axes that limit the number of shards."""
        for part in self.parts:
            yield from part.axes(block)

    def pages(self, layer: int, hidden: int, block: int) -> Iterator[PageSpec]:
        """Yield the pages that every step uses. The first one has the mixer, all norms, and what chooses experts."""
        yield PageSpec(ATTENTION, tuple(self._first_page(layer, hidden, block)), layer)
        if self.mlp:
            for name in self.mlp.pages:
                yield PageSpec(name, tuple(self.mlp.tensors(name, layer, hidden, block)), layer)

    def experts(self, layer: int, hidden: int, block: int) -> Sequence[PageSpec]:
        """Return the pages of experts."""
        return self.mlp.experts(layer, hidden, block) if self.mlp else ()

    def cache(self, place: Place, block: int) -> tuple[LayerCache, ...]:
        """Return the part of a sequence that the layer keeps on the rank at `place`."""
        return self.mixer.cache(place, block) if self.mixer else ()

    def _first_page(self, layer: int, hidden: int, block: int) -> Iterator[TensorSpec]:
        if self.entry:
            yield from self.entry.tensors(hidden)
        if self.mixer_norms.before:
            yield from self.mixer_norms.before.tensors("attn_norm", layer, hidden)
        if self.mixer:
            yield from self.mixer.tensors(layer, hidden, block)
        if self.mixer_norms.after:
            yield from self.mixer_norms.after.tensors("attn_post_norm", layer, hidden)
        if self.mixer_norms.of_sum:
            yield from self.mixer_norms.of_sum.tensors("attn_sum_norm", layer, hidden)
        if self.mlp_norms.before:
            yield from self.mlp_norms.before.tensors("ffn_norm", layer, hidden)
        if self.mlp:
            yield from self.mlp.first_page(layer, hidden)
        if self.mlp_norms.after:
            yield from self.mlp_norms.after.tensors("ffn_post_norm", layer, hidden)
        if self.mlp_norms.of_sum:
            yield from self.mlp_norms.of_sum.tensors("ffn_sum_norm", layer, hidden)
        if self.scaled:
            yield TensorSpec(Key("layer_scale", layer), (1,))
