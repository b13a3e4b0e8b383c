"""What a step's rows take on one rank while they pass through it."""

from __future__ import annotations

from mpillm.comm import grid
from mpillm.comm.grid import Place, Shape

COPY = 40 / 32  # bytes of a row for the kernels (Q8_0 with float32 scales and sums) for each of its values


def row_nbytes(shape: Shape, place: Place) -> int:
    """Bytes of activations for each row of a step, at most.

    Float32: the hidden state, what a half layer makes of it and its norm; then either queries, keys, values and
    attention's output, or gate and up of the feed-forward part, with experts also the sums of all column panels, and as
    much again for a row's copies for each of its experts (which are some megabytes at most: see `kernels.Mixture`).
    Shards decode all parts of a sum beside each other. What matrices are multiplied with is copied as int8.
    """
    d, shards = shape.hidden, place.shards
    heads, kv_heads = len(grid.own_heads(shape, place)), len(grid.own_kv_heads(shape, place))
    attention = (2 * heads + 2 * kv_heads + 1) * shape.head_dim  # and the angles
    feed_forward = max(2 * len(grid.own_ffn(shape, place, width)) for width in shape.ffn_widths)
    if shape.n_experts:
        feed_forward += (2 * grid.PANELS // shards + 1) * d
    summed = 2 * shards * d if shards > 1 else 0
    widest = max(attention, feed_forward)
    return int(4 * (4 * d + widest + summed) + COPY * max(d, widest))
