"""The KV cache of one rank: keys and values of its layers and KV heads, in blocks of `KV_BLOCK` tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpillm.kernels import KV_BLOCK, BlockType

_DTYPES = {BlockType.F32: np.float32, BlockType.F16: np.uint16}


def block_nbytes(n_layers: int, kv_heads: int, head_dim: int, kv_type: BlockType) -> int:
    """Bytes that one block of `KV_BLOCK` tokens takes on a rank with `n_layers` layers and `kv_heads` KV heads."""
    return 2 * n_layers * kv_heads * head_dim * KV_BLOCK * np.dtype(_DTYPES[kv_type]).itemsize


class KVCache:
    """Pools of blocks, one pair for each of the rank's layers.

    Keys are [block, KV head, dim, token] and values [block, KV head, token, dim], so that the lanes of both of
    attention's products run along contiguous memory. Memory is touched, and so used, only as blocks are written.
    """

    def __init__(
        self, n_layers: int, n_blocks: int, kv_heads: int, head_dim: int, kv_type: BlockType
    ) -> None:
        dtype = _DTYPES[kv_type]
        self.kv_type = kv_type
        self.n_blocks = n_blocks
        self.nbytes = n_blocks * block_nbytes(n_layers, kv_heads, head_dim, kv_type)
        keys = (n_blocks, kv_heads, head_dim, KV_BLOCK)
        values = (n_blocks, kv_heads, KV_BLOCK, head_dim)
        self.pools: list[tuple[NDArray[np.generic], NDArray[np.generic]]] = [
            (np.zeros(keys, dtype), np.zeros(values, dtype)) for _ in range(n_layers)
        ]
