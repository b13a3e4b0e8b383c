"""The KV cache of one rank: keys and values of its layers and KV heads, in blocks of `KV_BLOCK` tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpillm.comm import grid
from mpillm.comm.grid import Place, Shape
from mpillm.kernels import KV_BLOCK, BlockType

_DTYPES = {BlockType.F32: np.float32, BlockType.F16: np.uint16}


def block_nbytes(shape: Shape, place: Place, kv_type: BlockType) -> int:
    """Bytes that one block of `KV_BLOCK` tokens takes on the rank at `place`, of all its layers and KV heads."""
    layers, heads = len(grid.stage_layers(shape, place)), len(grid.own_kv_heads(shape, place))
    return 2 * layers * heads * shape.head_dim * KV_BLOCK * np.dtype(_DTYPES[kv_type]).itemsize


class KVCache:
    """Pools of blocks, one pair for each of the rank's layers.

    Keys are [block, KV head, dim, token] and values [block, KV head, token, dim], so that the lanes of both of
    attention's products run along contiguous memory. Memory is touched, and so used, only as blocks are written.
    """

    def __init__(self, shape: Shape, place: Place, n_blocks: int, kv_type: BlockType) -> None:
        dtype = _DTYPES[kv_type]
        self.kv_type = kv_type
        self.n_blocks = n_blocks
        self.nbytes = n_blocks * block_nbytes(shape, place, kv_type)
        heads, head_dim = len(grid.own_kv_heads(shape, place)), shape.head_dim
        keys = (n_blocks, heads, head_dim, KV_BLOCK)
        values = (n_blocks, heads, KV_BLOCK, head_dim)
        self.pools: list[tuple[NDArray[np.generic], NDArray[np.generic]]] = [
            (np.zeros(keys, dtype), np.zeros(values, dtype)) for _ in grid.stage_layers(shape, place)
        ]
