"""The KV cache of one rank: keys and values of its layers and KV heads, in blocks of `KV_BLOCK` tokens."""

from __future__ import annotations

import contextlib
import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpillm.errors import JobError
from mpillm.kernels import QUANT_BLOCK, BlockType, kv_pools
from mpillm.model.cache_spec import TokenCache
from mpillm.model.config import ModelConfig
from mpillm.model.spill import Pools, Spill
from mpillm.partition import grid
from mpillm.partition.grid import Place

HUGE = 4 * 2**20  # from so many bytes on, memory comes in huge pages, as NumPy has it

Ints = NDArray[np.int32]


def stored_type(asked: str, config: ModelConfig) -> BlockType:
    """The number type that `memory.kv_type` means; "auto" is f16 where the weights are quantised, else f32.

    JobError if this model's keys and values cannot be kept in it.
    """
    dims = {layer.mixer.head_dim for layer in config.layers}
    if asked == "q8_0" and any(dim % QUANT_BLOCK for dim in dims):
        raise JobError(
            f'memory.kv_type = "q8_0" needs heads of a multiple of {QUANT_BLOCK} dimensions, and this model\'s have '
            f'{min(dims)}; use "f16".'
        )
    if asked == "auto":
        return BlockType.F16 if config.block > 1 else BlockType.F32
    return BlockType[asked.upper()]


def block_nbytes(config: ModelConfig, place: Place, kv_type: BlockType) -> int:
    """Bytes that one block of `KV_BLOCK` tokens takes on the rank at `place`, of all its layers and KV heads."""
    caches = config.cache(place)
    return sum(
        math.prod(sizes) * np.dtype(dtype).itemsize
        for layer in grid.stage_layers(config.n_layers, place)
        for kept in caches[layer]
        if isinstance(kept, TokenCache)
        for sizes, dtype in kv_pools(kv_type, 1, kept.kv_heads, kept.k_dim, kept.v_dim)
    )


class KVCache:
    """Pools of blocks, one pair for each of the rank's layers; `kernels.kv_pools` says what they look like.

    The lanes of both of attention's products run along contiguous memory. Memory is touched, and so used, only as
    blocks are written.
    """

    def __init__(
        self,
        config: ModelConfig,
        place: Place,
        n_blocks: int,
        kv_type: BlockType,
        budget: int | None = None,
        spill_dir: Path | None = None,
    ) -> None:
        """`budget` in bytes; if the blocks take more, layers lie in a file in `spill_dir` (see `spill`)."""
        self.kv_type = kv_type
        self.n_blocks = n_blocks
        ((kept,), *_) = config.cache(place)
        assert isinstance(kept, TokenCache)
        self._shape = kept.kv_heads, kept.k_dim
        self._block_nbytes = block_nbytes(config, place, kv_type)
        self._most = 0  # blocks that have been in use
        self.peak = 0  # bytes of memory that were in use
        n_layers = len(grid.stage_layers(config.n_layers, place))
        self.spill: Spill | None = None
        if budget is not None and n_blocks * self._block_nbytes > budget:
            assert spill_dir is not None
            room = budget // (self._block_nbytes // n_layers)
            self.spill = Spill(spill_dir, self._new_pools, n_layers, room, n_blocks)
        self._pools: list[Pools | None] = [self._new_pools() for _ in range(n_layers)]

    def begin(self, table: Ints, block: Ints, offset: Ints) -> None:
        """A step begins that looks at all blocks of `table`, and writes tokens to these blocks at these offsets."""
        top = int(block.max()) + 1
        if self.spill is not None:
            self.spill.make_room(top, self._pools)
            if self.spill.layers:
                begun = np.unique(block[offset == 0])  # by this very step: nothing is in them yet
                self.spill.begin(np.setdiff1d(table, begun), np.unique(block))
        if top > self._most:
            self._most = top
            held = top * self._block_nbytes if self.spill is None else self.spill.held
            self.peak = max(self.peak, held)

    def take(self, i: int) -> Pools:
        """Keys and values of this rank's layer number i, in the order of the layers."""
        pools = self._pools[i]
        if pools is None:
            assert self.spill is not None
            pools = self.spill.take(i)
        return pools

    def give(self, i: int) -> None:
        """The step is done with that layer."""
        if self._pools[i] is None:
            assert self.spill is not None
            self.spill.give(i)

    def close(self) -> None:
        """Let go of the file, if there is one."""
        if self.spill is not None:
            self.spill.close()

    def _new_pools(self) -> Pools:
        """A layer's keys and values, all zero, in memory of their own that begins at a page and goes with them."""
        return tuple(
            _zeros(shape, np.dtype(dtype))
            for shape, dtype in kv_pools(self.kv_type, self.n_blocks, *self._shape)
        )


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    nbytes = int(np.prod(shape)) * dtype.itemsize
    memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= HUGE:
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)
