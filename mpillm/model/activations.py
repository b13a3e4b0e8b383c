"""Compute the bytes of a step's rows on one rank while they pass through it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mpillm.kernels.types import ACTIVATION_BLOCK_BYTES, MIXED_ROWS, PANEL_ROW, QUANT_BLOCK, BlockType
from mpillm.model.config import ModelConfig
from mpillm.model.layers.spec import LayerSpec
from mpillm.partition.grid import Place
from mpillm.weights.roles import ROLES
from mpillm.weights.source import Source

# Bytes of a value as products with quantised weights take it.
QUANTISED = ACTIVATION_BLOCK_BYTES / QUANT_BLOCK
WHOLE = (PANEL_ROW + QUANT_BLOCK) / QUANT_BLOCK  # with W8A8: a panel has at least one block
NUMBERS = (
    160  # bytes of a row's token, position, and places in caches: as they come, and as kernels take them
)


@dataclass(frozen=True)
class Activations:
    """A model's rows. `copied`: bytes of a value in the forms in which its matrices take what they multiply."""

    config: ModelConfig
    copied: float = QUANTISED

    @cached_property
    def _layers(self) -> frozenset[LayerSpec]:
        """Each kind of layer once: planning asks often, and a model has many layers."""
        return frozenset(self.config.layers)

    @cached_property
    def angles_nbytes(self) -> int:
        """Bytes of a position's cosines and sines, of all kinds of RoPE that layers have."""
        turns = {layer.mixer.turn for layer in self.config.layers if layer.mixer and layer.mixer.turn}
        return sum(4 * dim for _, dim in turns)

    def row_nbytes(self, place: Place) -> int:
        """Return bytes for each row of a step, at most.

        Float32: the hidden state, what a part of a layer makes of it, and its norm, or both parts where they are beside
        each other; then what the widest part takes. Shards decode all parts of a sum beside each other. Through the
        whole step go cosines and sines of each RoPE.
        """
        config, d, shards = self.config, self.config.hidden, place.shards
        beside = any(layer.parallel for layer in config.layers)
        widest = max(
            part.row_nbytes(place, config.block, d, self.copied)
            for layer in self._layers
            for part in layer.parts
        )
        summed = 2 * shards * d if shards > 1 else 0
        if config.adapters is not None:
            widest += config.adapters.row_nbytes(place)
        return 4 * ((3 + beside) * d + summed) + widest + NUMBERS + self.angles_nbytes

    def nbytes(self, place: Place, rows: int) -> int:
        """Return the maximum bytes for a step of `rows` rows; a mixture takes more: a row goes to several experts."""
        config = self.config
        mixed = max(
            (
                layer.mlp.mixed_row_nbytes(place, config.block, config.hidden, self.copied)
                * max(min(MIXED_ROWS, rows * layer.mlp.count) - rows, 0)
                for layer in self._layers
                if layer.mlp
            ),
            default=0,
        )
        return rows * self.row_nbytes(place) + mixed


def activations_of(source: Source, config: ModelConfig) -> Activations:
    """Return the rows of a source's model."""
    types = {info.type.multiplied_as for key, info in source.tensors.items() if ROLES[key.role].quantisable}
    forms = {BlockType.W8A8 if type.whole else BlockType.Q8_0 if type.quantised else
             BlockType.BF16 if type is BlockType.BF16 else BlockType.F32 for type in types}  # fmt: skip
    sizes = {BlockType.W8A8: WHOLE, BlockType.Q8_0: QUANTISED}
    return Activations(config, sum(sizes.get(form, 4.0) for form in forms))
