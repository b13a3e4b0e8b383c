"""The cache of one rank: blocks of its layers' keys and values, and one state of its sequences for each slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpillm.model.cache_layout import CacheLayout, TokenLayer
from mpillm.model.spill import Ints, LayerPools, Spill, new_pool

Arrays = tuple[NDArray[Any], NDArray[Any]]  # a layer's keys and values, as `kernels.kv_pools` describes them


@dataclass(frozen=True, slots=True)
class GroupTables:
    """The block tables of one group in a step: where each row's keys and values go, and where those before it are.

    `table[table_start[i] + j]` is block number j of the sequence that row i belongs to, for all blocks that the row
    attends to. The first `padding` entries stand for no block.
    """

    table: Ints
    table_start: Ints
    block: Ints  # the block that takes the row's keys and values
    padding: int = 0


class StateMoves(NamedTuple):
    """The changes of states in a step besides computing them, by slots; a pair is a written slot and its source."""

    fresh: Sequence[int] = ()  # slots of sequences that begin, whose states are zeros
    loaded: Sequence[tuple[int, int]] = ()  # before the step
    saved: Sequence[tuple[int, int]] = ()  # after it


class KVCache:
    """Pools of blocks, and states. Memory is touched, and so used, only as blocks are written."""

    def __init__(
        self,
        layout: CacheLayout,
        n_blocks: int,
        n_states: int = 0,
        budget: int | None = None,
        spill_dir: Path | None = None,
    ) -> None:
        """`budget`, in bytes, is for both; if they take more, pools lie in a file in `spill_dir` (see `spill`)."""
        self.layout = layout
        self.kv_type = layout.kv_type
        self.n_blocks = n_blocks
        self._states = [np.zeros((n_states, nbytes), np.uint8) for nbytes in layout.states]
        self._states_nbytes = n_states * layout.state_nbytes
        self._states_used = set[int]()  # slots that have been in use
        self._top = 0  # blocks that have been in use
        self._blocks_peak = 0  # bytes of blocks in memory
        self.spill: Spill | None = None
        if budget is not None and n_blocks * layout.block_nbytes > budget - self._states_nbytes:
            assert spill_dir is not None
            layers = [(layer.pool, layer.group) if layer else None for layer in layout.tokens]
            self.spill = Spill(spill_dir, layout.pools, layers, budget - self._states_nbytes, n_blocks)
        self._arrays: dict[int, Arrays] = {}  # the arrays of layers whose pools are in memory
        self._pools: list[LayerPools | None] = [new_pool(n_blocks, nbytes) for nbytes in layout.pools]

    @property
    def peak(self) -> int:
        """Bytes of memory that have been in use, of states and of blocks."""
        return len(self._states_used) * self.layout.state_nbytes + self._blocks_peak

    def begin(self, groups: Sequence[GroupTables], offset: Ints, moves: StateMoves) -> None:
        """Begin a step that reads all blocks of these tables, and writes each row at its block and `offset`."""
        self._move(moves.loaded)
        self._states_used.update(moves.fresh)
        for states in self._states if moves.fresh else ():
            states[list(moves.fresh)] = 0
        if not groups:
            return
        top = max(int(group.block.max()) for group in groups) + 1
        if self.spill is not None:
            self.spill.make_space(top, self._pools)
            self._arrays.clear()  # some pools may have left memory
            if self.spill.layers:
                new = [np.unique(group.block[offset == 0]) for group in groups]  # nothing is in them yet
                needed = [
                    np.setdiff1d(group.table[group.padding :], filled)
                    for group, filled in zip(groups, new, strict=True)
                ]
                self.spill.begin(needed, [np.unique(group.block) for group in groups])
        if top > self._top:
            self._top = top
            held = top * self.layout.block_nbytes if self.spill is None else self.spill.held
            self._blocks_peak = max(self._blocks_peak, held)

    def end(self, moves: StateMoves) -> None:
        """End the step: all of its layers have been computed."""
        self._move(moves.saved)

    def acquire(self, i: int) -> Arrays:
        """Keys and values of this rank's layer number i; layers follow each other in their order."""
        layer = self._layer(i)
        pool = self._pools[layer.pool]
        if pool is None:
            assert self.spill is not None
            return self._seen(layer, self.spill.acquire(i))
        known = self._arrays.get(i)
        if known is None:
            known = self._arrays[i] = self._seen(layer, pool)
        return known

    def release(self, i: int) -> None:
        """Release the layer: the step does not need it any more."""
        if self._pools[self._layer(i).pool] is None:
            assert self.spill is not None
            self.spill.release(i)

    def group_of(self, i: int) -> int | None:
        """Return the group whose block tables belong to this rank's layer number i, if it has keys and values."""
        layer = self.layout.tokens[i]
        return None if layer is None else layer.group

    def states(self, i: int) -> NDArray[np.uint8]:
        """Return the states that this rank's layer number i keeps, [slot, bytes].

        At a sequence's first token they are zeros.
        """
        return self._states[i]

    def of_layer(self, i: int) -> LayerCacheView:
        """Return the view of the cache for layer number i of this rank."""
        return LayerCacheView(self, i)

    def close(self) -> None:
        """Let go of the file, if there is one."""
        if self.spill is not None:
            self.spill.close()

    def _move(self, pairs: Sequence[tuple[int, int]]) -> None:
        self._states_used.update(written for written, _ in pairs)
        for states in self._states if pairs else ():
            for written, read in pairs:
                states[written] = states[read]

    def _layer(self, i: int) -> TokenLayer:
        layer = self.layout.tokens[i]
        assert layer is not None, f"layer {i} of this rank keeps no keys and values"
        return layer

    def _seen(self, layer: TokenLayer, pool: LayerPools) -> Arrays:
        """Return a pool's bytes as the arrays that the kernels work on."""
        (key_shape, key_type), (value_shape, value_type) = layer.keys, layer.values
        keys, values = pool
        return (
            keys.view(key_type).reshape(self.n_blocks, *key_shape),
            values.view(value_type).reshape(self.n_blocks, *value_shape),
        )


class LayerCacheView:
    """The part of sequences that layer number i of a rank keeps."""

    def __init__(self, kv: KVCache, i: int) -> None:
        self._kv, self._i = kv, i
        self.kv_type = kv.kv_type
        self.group = kv.group_of(i)  # the group whose block tables the layer uses

    def acquire(self) -> Arrays:
        """Return the keys and values of the layer, until `release`. Layers are used in their order."""
        return self._kv.acquire(self._i)

    def release(self) -> None:
        """Release this layer: the step does not need it any more."""
        self._kv.release(self._i)

    @property
    def states(self) -> NDArray[np.float32]:
        """The states of sequences, f32 [slot, floats]; see `KVCache.states`."""
        return self._kv.states(self._i).view(np.float32)
