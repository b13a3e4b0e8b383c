"""What a step's rows take on one rank while they pass through it."""

from __future__ import annotations

from dataclasses import dataclass

from mpillm.kernels.types import ACTIVATION_BLOCK_BYTES, MIXED_ROWS, QUANT_BLOCK, BlockType
from mpillm.partition import grid
from mpillm.partition.grid import Place, Shape
from mpillm.weights.names import ROLES
from mpillm.weights.source import Source

QUANTISED = (
    ACTIVATION_BLOCK_BYTES / QUANT_BLOCK
)  # bytes of a value as products with quantised weights take it


@dataclass(frozen=True)
class Activations:
    """A model's rows. `copied`: bytes of a value in the forms in which its matrices take what they multiply."""

    shape: Shape
    copied: float = QUANTISED

    def row_nbytes(self, place: Place) -> int:
        """Bytes for each row of a step, at most.

        Float32: the hidden state, what a half layer makes of it and its norm; then either queries, keys, values and
        attention's output, or gate and up of the feed-forward part, with experts also the sums of all column panels.
        What matrices are multiplied with is copied. Shards decode all parts of a sum beside each other.
        """
        shape, d, shards = self.shape, self.shape.hidden, place.shards
        heads, kv_heads = len(grid.own_heads(shape, place)), len(grid.own_kv_heads(shape, place))
        widest = 4 * (2 * heads + 2 * kv_heads + 1) * shape.head_dim  # and the angles
        widest += int(self.copied * (d + heads * shape.head_dim))
        sums = 4 * grid.PANELS // shards * d if shape.n_experts else 0
        for width in shape.ffn_widths:
            widest = max(widest, sums + self._feed_forward(len(grid.own_ffn(shape, place, width))))
        summed = 2 * shards * d if shards > 1 else 0
        return 4 * (4 * d + summed) + widest

    def nbytes(self, place: Place, rows: int) -> int:
        """Bytes for a step of so many rows, at most; a mixture's rows are many, for each goes to several experts."""
        shape, mixed = self.shape, 0
        if shape.n_experts:
            mixed = self._feed_forward(len(grid.own_ffn(shape, place, shape.moe_intermediate)))
            mixed *= min(MIXED_ROWS, rows * shape.n_experts)
        return rows * self.row_nbytes(place) + mixed

    def _feed_forward(self, width: int) -> int:
        return 4 * 2 * width + int(self.copied * (self.shape.hidden + width))


def activations_of(source: Source, shape: Shape) -> Activations:
    """The rows of a source's model."""
    types = {info.type for key, info in source.tensors.items() if ROLES[key.role].quantisable}
    forms = {BlockType.Q8_0 if type.quantised else BlockType.BF16 if type is BlockType.BF16 else BlockType.F32
             for type in types}  # fmt: skip
    return Activations(shape, sum(QUANTISED if form.quantised else 4 for form in forms))
