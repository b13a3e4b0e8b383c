"""The division of a model: ranks = stages x shards, and slices of tensors as pure functions of axes and a place.

A stage holds a run of layers; the shards of a stage each hold a part of every one of its layers. A dimension that
shards share is an `Axis`. Where it is the input of a product (columns of a matrix), the product is computed as a power
of two of column panels whose sums are folded in one fixed binary tree. A shard owns whole, neighbouring panels, and the
panels depend on the model's shape alone, so the tree is the same one for 1, 2, 4 or 8 shards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mpillm.errors import LayoutError
from mpillm.words import count_of

PANELS = 8  # column panels of a matrix whose sums are folded; with it the largest number of shards
VOCAB_UNIT = 16  # rows of the LM head are cut at the kernels' tile height ...
SMALL_VOCAB = 128  # ... unless the vocabulary is so small that shards would go without

Auto = Literal["auto"]


class Divisible(Protocol):
    """The facts about a model that determine on how many ranks it can be laid out."""

    @property
    def n_layers(self) -> int: ...
    @property
    def max_shards(self) -> int:
        """The most shards that leave none without a panel of something: a power of two."""


@dataclass(frozen=True)
class Axis:
    """A dimension of tensors that shards share: units (heads, columns, vocabulary rows) of `width` entries each.

    `bounds` are those of its panels, in units: a power of two of panels, none empty. With `share` > 1
    that many units in a row use the same entries (query heads that share a KV head). A shard then holds what its units
    use.
    """

    bounds: tuple[int, ...]
    width: int = 1
    share: int = 1

    @property
    def panels(self) -> int:
        """The number of panels."""
        return len(self.bounds) - 1

    @property
    def total(self) -> int:
        """All entries of the dimension."""
        return -(-self.bounds[-1] // self.share) * self.width

    def units(self, place: Place) -> range:
        """Return the units of the shard at `place`; with `share`, the shared ones that they use.

        Shared units are held twice where shards straddle or outnumber them.
        """
        bounds = self._own_bounds(place)
        return range(bounds[0] // self.share, (bounds[-1] - 1) // self.share + 1)

    def entries(self, place: Place) -> range:
        """Return the shard's entries of the dimension: rows or columns of a tensor."""
        units = self.units(place)
        return range(units.start * self.width, units.stop * self.width)

    def own_panels(self, place: Place) -> tuple[int, ...]:
        """Return the bounds of the shard's panels in entries, relative to its first one."""
        assert self.share == 1
        own = self._own_bounds(place)
        return tuple((bound - own[0]) * self.width for bound in own)

    def shared(self, share: int) -> Axis:
        """Return the axis of what every `share` units of this one use together."""
        return Axis(self.bounds, self.width, share)

    def _own_bounds(self, place: Place) -> Sequence[int]:
        each, rest = divmod(self.panels, place.shards)
        assert rest == 0
        assert each, f"{place.shards} shards of {self.panels} panels"
        return self.bounds[place.shard * each : (place.shard + 1) * each + 1]


def axis(units: int, width: int = 1, block: int = 1) -> Axis:
    """Return an axis of `units` units in up to PANELS panels of multiples of `block` entries (the last may be short).

    `block` is the block size of quantised weights, for a block is never cut.
    """
    grain = math.lcm(width, block) // width
    grains = max(math.ceil(units / grain), 1)
    return Axis(panel_bounds(units, grain, min(PANELS, 1 << (grains.bit_length() - 1))), width)


def vocab_axis(vocab: int) -> Axis:
    """Return the axis of the LM head's rows."""
    return axis(vocab, block=VOCAB_UNIT if vocab >= SMALL_VOCAB else 1)


@dataclass(frozen=True)
class Place:
    """A rank's place in the grid; the shards of a stage are neighbours in rank order."""

    rank: int  # within its replica
    stages: int
    shards: int
    first: int = 0  # the world's rank of the replica's rank 0 (see `replicas`)
    layers: tuple[int, ...] = ()  # the number of layers of each stage; empty: as evenly as possible

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.stages * self.shards, self

    @property
    def stage(self) -> int:
        """The number of the rank's stage."""
        return self.rank // self.shards

    @property
    def shard(self) -> int:
        """The number of the rank's shard in its stage."""
        return self.rank % self.shards

    @property
    def size(self) -> int:
        """Ranks of the replica."""
        return self.stages * self.shards

    @property
    def is_first_stage(self) -> bool:
        """Whether it looks embeddings up."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether it computes logits."""
        return self.stage == self.stages - 1


def panel_bounds(total: int, unit: int, count: int) -> tuple[int, ...]:
    """Cut 0..total into `count` panels of whole units (the last unit may be short): count + 1 bounds."""
    units = math.ceil(total / unit)
    return tuple(min(p * units // count * unit, total) for p in range(count + 1))


def stage_layers(n_layers: int, place: Place) -> range:
    """Return the layers of this rank's stage.

    Where the place does not say how many each stage has, they are divided evenly, and left-over layers go to the first
    stages, for the last one has the LM head to compute.
    """
    if place.layers:
        assert sum(place.layers) == n_layers, place
        first = sum(place.layers[: place.stage])
        return range(first, first + place.layers[place.stage])
    each, extra = divmod(n_layers, place.stages)
    first = place.stage * each + min(place.stage, extra)
    return range(first, first + each + (place.stage < extra))


def layers_by_speed(
    n_layers: int, seconds: Sequence[float], extra: Sequence[float], maximum: Sequence[int]
) -> tuple[int, ...]:
    """Return the number of layers of each stage, at least 1, with which the slowest stage is as fast as possible.

    A layer takes `seconds` of a stage, which has `extra` seconds to do besides, and memory for `maximum` layers; where
    that is too little for all layers, the rest is divided as if there were enough.
    """
    counts = [1] * len(seconds)
    for _ in range(n_layers - len(counts)):
        stages = range(len(counts))
        free = [stage for stage in stages if counts[stage] < maximum[stage]] or stages
        stage = min(free, key=lambda stage: (counts[stage] + 1) * seconds[stage] + extra[stage])
        counts[stage] += 1
    return tuple(counts)


def layouts(model: Divisible, ranks: int) -> list[tuple[int, int]]:
    """Return all (stages, shards) on which this model can be laid out over `ranks` ranks, most shards first."""
    shards = model.max_shards
    works = []
    while shards:
        if ranks % shards == 0 and ranks // shards <= model.n_layers:
            works.append((ranks // shards, shards))
        shards //= 2
    return works


def choose(
    model: Divisible,
    ranks: int,
    stages: int | Auto = "auto",
    shards: int | Auto = "auto",
    ranks_per_host: Sequence[int] | None = None,
) -> tuple[int, int]:
    """Return (stages, shards) for `ranks` ranks, or say what would work (LayoutError).

    What is given is kept. What is "auto" becomes as many shards as the model allows, but no shard group that
    reaches over two hosts (shards talk twice a layer, stages once a step) if another layout works.
    `ranks_per_host`, if known, has the lengths of the runs of consecutive ranks on one host, in rank order.
    """
    works = layouts(model, ranks)
    refused = f"{_described(model)} cannot be laid out on {count_of(ranks, 'rank')}"
    if not works:
        raise LayoutError(f"{refused}; {_ranks_that_work(model, ranks)}.")
    fits = [pair for pair in works if stages in ("auto", pair[0]) and shards in ("auto", pair[1])]
    if not fits:
        given = ((stages, "stage"), (shards, "shard"))
        asked = " x ".join(count_of(number, kind) for number, kind in given if number != "auto")
        raise LayoutError(
            f"{refused} as {asked} (ranks = stages x shards); what works: {_listed(works)}. "
            "Change [layout] or the number of ranks."
        )
    within = [pair for pair in fits if not crosses_hosts(pair[1], ranks_per_host)]
    return (within or fits)[0]


def choose_fewer(
    model: Divisible, ranks: int, shards: int, same_shards: bool, ranks_per_host: Sequence[int] | None = None
) -> tuple[int, int]:
    """Return (stages, shards) for the `ranks` ranks that are left of a run with `shards` shards; some may be left over.

    As many ranks as can be used, and then the shards there were; the other way round if `same_shards`.
    """
    works = [pair for used in range(1, ranks + 1) for pair in layouts(model, used)]

    def worth(pair: tuple[int, int]) -> tuple[bool, int, bool, bool, int]:
        used, same = pair[0] * pair[1], pair[1] == shards
        return same and same_shards, used, same, not crosses_hosts(pair[1], ranks_per_host), pair[1]

    return max(works, key=worth)


def crosses_hosts(shards: int, ranks_per_host: Sequence[int] | None) -> bool:
    """True if some shard group has ranks of two hosts."""
    border = 0
    for ranks in (ranks_per_host or ())[:-1]:
        border += ranks
        if border % shards:
            return True
    return False


def _ranks_that_work(model: Divisible, ranks: int) -> str:
    maximum = model.n_layers * model.max_shards
    fewer = next((n for n in range(min(ranks - 1, maximum), 0, -1) if layouts(model, n)), None)
    more = next((n for n in range(ranks + 1, maximum + 1) if layouts(model, n)), None)
    near = [f"{n} as {_listed(layouts(model, n))}" for n in (fewer, more) if n is not None]
    return f"the nearest that work: {'; '.join(near)}"


def _described(model: Divisible) -> str:
    layers, shards = count_of(model.n_layers, "layer"), count_of(model.max_shards, "shard")
    return f"A model with {layers} that can be cut into at most {shards}"


def _listed(works: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{count_of(stages, 'stage')} x {count_of(shards, 'shard')}" for stages, shards in works)
