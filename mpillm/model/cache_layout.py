"""Compute which layers share a block table and which share memory: the cache of one rank, from its layers' specs.

Layers that keep tokens equally long (all of them, or the last `window`) are alike. All layers that are alike, or parts
of them of about as many layers as the rarest sort has, form a *group*. Each sequence has a block table for each group.
A *pool* is memory for the blocks of one layer of every group, and a block number stands for a block in all pools of a
rank, so any block can serve any group: those that fall behind a window serve whoever needs one next, and memory need
not be divided between the groups beforehand. (The hybrid KV cache manager of vLLM works in the same way.)

Two layers of different groups share a pool where their blocks take the same bytes. Where they do not, each has a pool,
of which the other one's blocks are not used.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np

from mpillm.errors import JobError
from mpillm.kernels import KV_BLOCK, QUANT_BLOCK, KvType, kv_pools
from mpillm.model.cache_spec import LayerCache, SequenceState, TokenCache
from mpillm.partition import grid
from mpillm.partition.grid import Place

ArrayType = tuple[tuple[int, ...], type]  # shape and element type
SPLIT = 1.25  # sorts of layers whose numbers differ by less form one group each


def blocks_for(tokens: int) -> int:
    """Return the number of blocks that hold `tokens` tokens."""
    return -(-tokens // KV_BLOCK)


class Caching(Protocol):
    """The facts about a model that determine its cache; `ModelConfig` has them."""

    @property
    def n_layers(self) -> int: ...
    @property
    def block(self) -> int:
        """The block size of weights that are cut by columns."""

    def cache(self, place: Place) -> list[tuple[LayerCache, ...]]:
        """Return the parts of a sequence that each layer of the model keeps on the rank at `place`."""


def rank_layouts(config: Caching, places: Sequence[Place], asked: str) -> list[CacheLayout]:
    """Return the layouts of ranks at `places`, where `memory.kv_type` is `asked`; JobError if it cannot be that."""
    caches = [config.cache(place) for place in places]
    groups, kv_type = groups_of(caches[0]), stored_type(asked, caches[0], config.block > 1)
    return [
        cache_layout(own, groups, grid.stage_layers(config.n_layers, place), kv_type)
        for own, place in zip(caches, places, strict=True)
    ]


@dataclass(frozen=True)
class Groups:
    """The groups of a model's layers, the same on every rank.

    `windows` has each group's window, 0 where all tokens are kept. `of_layers` has each layer's group, None for a layer
    that keeps no tokens.
    """

    windows: tuple[int, ...]
    of_layers: tuple[int | None, ...]


def groups_of(caches: Sequence[Sequence[LayerCache]]) -> Groups:
    """Return the groups of layers that keep `caches`."""
    windows = [token.window if (token := token_cache(specs)) else None for specs in caches]
    counts = Counter(window for window in windows if window is not None)
    if not counts:
        return Groups((), (None,) * len(caches))
    fewest, largest = min(counts.values()), max(counts.values())
    size = largest if largest < SPLIT * fewest else fewest
    first: dict[int, int] = {}
    of_groups: list[int] = []
    for window in sorted(counts):
        first[window] = len(of_groups)
        of_groups += [window] * -(-counts[window] // size)
    seen: Counter[int] = Counter()
    of_layers: list[int | None] = []
    for own in windows:
        if own is None:
            of_layers.append(None)
            continue
        # Neighbours go to different groups, so that each stage has about as many layers of each.
        of_layers.append(first[own] + seen[own] % of_groups.count(own))
        seen[own] += 1
    return Groups(tuple(of_groups), tuple(of_layers))


@dataclass(frozen=True)
class TokenLayer:
    """The place of a layer's keys and values: blocks of `group`, pool number `pool`, as arrays of these types.

    The types are those of one block.
    """

    group: int
    pool: int
    keys: ArrayType
    values: ArrayType

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes of a block's keys and of its values."""
        return _nbytes(self.keys), _nbytes(self.values)


@dataclass(frozen=True)
class CacheLayout:
    """The cache of one rank.

    `pools` has the bytes of a block's keys and of its values, for each pool; `tokens` and `states` have for each of the
    rank's layers where its keys and values are, and the bytes of its state: None and 0 where it has none.
    """

    kv_type: KvType
    windows: tuple[int, ...]
    pools: tuple[tuple[int, int], ...]
    tokens: tuple[TokenLayer | None, ...]
    states: tuple[int, ...]

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block, in all pools."""
        return sum(map(sum, self.pools))

    @property
    def token_nbytes(self) -> int:
        """Bytes that all layers keep of one token."""
        places = {(layer.group, layer.pool): sum(layer.nbytes) for layer in self.tokens if layer}
        return sum(places.values()) // KV_BLOCK

    @property
    def state_nbytes(self) -> int:
        """Bytes of one sequence's states, of all layers."""
        return sum(self.states)


def cache_layout(
    caches: Sequence[Sequence[LayerCache]], groups: Groups, layers: range, kv_type: KvType
) -> CacheLayout:
    """Return the layout of a rank that has `layers`; `caches` has the part of each model layer on that rank."""
    pools: dict[
        tuple[tuple[int, int], int], int
    ] = {}  # by a block's bytes, and the place among those of its group
    used: Counter[tuple[int, tuple[int, int]]] = Counter()
    tokens: list[TokenLayer | None] = []
    for number in layers:
        spec, group = token_cache(caches[number]), groups.of_layers[number]
        if spec is None or group is None:
            tokens.append(None)
            continue
        keys = _of_block(kv_pools(kv_type, 1, spec.kv_heads, spec.k_dim)[0])
        values = _of_block(kv_pools(kv_type, 1, spec.kv_heads, spec.v_dim)[1])
        nbytes = _nbytes(keys), _nbytes(values)
        pool = pools.setdefault((nbytes, used[group, nbytes]), len(pools))
        used[group, nbytes] += spec.kept
        tokens.append(TokenLayer(group, pool, keys, values))
    states = tuple(
        sum(spec.nbytes for spec in caches[number] if isinstance(spec, SequenceState)) for number in layers
    )
    return CacheLayout(kv_type, groups.windows, tuple(nbytes for nbytes, _ in pools), tuple(tokens), states)


def token_cache(specs: Sequence[LayerCache]) -> TokenCache | None:
    """Return the spec of a layer that keeps something for each token; None if there is none."""
    found = [spec for spec in specs if isinstance(spec, TokenCache)]
    assert len(found) <= 1, specs
    return found[0] if found else None


def stored_type(asked: str, caches: Sequence[Sequence[LayerCache]], quantised: bool) -> KvType:
    """Return the number type that `memory.kv_type` means; "auto" is f16 where the weights are quantised, else f32.

    JobError if these layers' keys and values cannot be kept in it.
    """
    if asked == "auto":
        return KvType.F16 if quantised else KvType.F32
    type = KvType[asked.upper()]
    if type.int8:
        tokens = [spec for specs in caches if (spec := token_cache(specs))]
        for dim in (dim for spec in tokens for dim in (spec.k_dim, spec.v_dim)):
            if dim % QUANT_BLOCK:
                raise JobError(
                    f'memory.kv_type = "{asked}" needs heads of a multiple of {QUANT_BLOCK} dimensions, and this '
                    f'model\'s have {dim}; use "f16".'
                )
    return type


def name_of(type: KvType) -> str:
    """Return the name of a type in `memory.kv_type`."""
    return type.name.lower()


def blocks_needed(tokens: int, windows: Sequence[int]) -> int:
    """Blocks of all groups together that a sequence of `tokens` tokens takes at most, one token at a time."""
    return sum(
        min(blocks_for(tokens), window_blocks(window)) if window else blocks_for(tokens) for window in windows
    )


@cache
def longest_sequence(n_blocks: int, windows: Sequence[int]) -> int:
    """Return the most tokens, up to 2^31 - 1, of a sequence that `n_blocks` blocks hold."""
    low, high = 0, 2**31 - 1
    while low < high:
        tokens = high - (high - low) // 2
        if blocks_needed(tokens, windows) <= n_blocks:
            low = tokens
        else:
            high = tokens - 1
    return low


def window_blocks(window: int) -> int:
    """Return the most blocks that `window` neighbouring tokens touch."""
    return (window + KV_BLOCK - 2) // KV_BLOCK + 1


def first_kept(position: int, window: int) -> int:
    """Return the first block that the token at `position`, and those after it, attend to."""
    return max(position - window + 1, 0) // KV_BLOCK if window else 0


def _of_block(pool: ArrayType) -> ArrayType:
    (_, *shape), dtype = pool
    return tuple(shape), dtype


def _nbytes(array: ArrayType) -> int:
    shape, dtype = array
    return math.prod(shape) * np.dtype(dtype).itemsize
