"""Who owns what: ranks = stages x shards, and the slices of a layer as pure functions of shape and place.

A stage holds a run of layers; the shards of a stage each hold a part of every one of its layers. What is cut
by columns (o, down) is computed as a power of two of column panels whose sums are folded in one fixed binary
tree. A shard owns whole, neighbouring panels, and the panels depend on the model's shape alone, so the tree
is the same one for 1, 2, 4 or 8 shards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mpillm.errors import LayoutError

PANELS = 8  # column panels of a matrix whose sums are folded; with it the largest number of shards
VOCAB_UNIT = 16  # rows of the output head are cut at the kernels' tile height ...
SMALL_VOCAB = 128  # ... unless the vocabulary is so small that shards would go without

Auto = Literal["auto"]


@dataclass(frozen=True)
class Shape:
    """What of a model decides how it can be cut.

    `unit` is the granularity of column cuts: a block is never cut, so 32 if any weight is quantised, 256 if those that
    are cut by columns are K-quants, else 1.
    """

    n_layers: int
    hidden: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    n_experts: int = 0
    moe_intermediate: int = 0
    unit: int = 32

    @property
    def ffn_widths(self) -> tuple[int, ...]:
        """The widths of the feed-forward blocks a layer can have: dense, and one expert's."""
        widths = {self.intermediate, self.moe_intermediate if self.n_experts else 0}
        return tuple(sorted(widths - {0}))


@dataclass(frozen=True)
class Place:
    """A rank's place in the grid; the shards of a stage are neighbours in rank order."""

    rank: int
    stages: int
    shards: int

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.stages * self.shards, self

    @property
    def stage(self) -> int:
        return self.rank // self.shards

    @property
    def shard(self) -> int:
        return self.rank % self.shards

    @property
    def size(self) -> int:
        return self.stages * self.shards

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.stages - 1


def panel_bounds(total: int, unit: int, count: int) -> tuple[int, ...]:
    """Cut 0..total into `count` panels of whole units (the last unit may be short): count + 1 bounds."""
    units = math.ceil(total / unit)
    return tuple(min(p * units // count * unit, total) for p in range(count + 1))


def _panels(total: int, unit: int) -> tuple[int, ...]:
    """Up to PANELS panels, a power of two of them, none empty."""
    units = math.ceil(total / unit)
    return panel_bounds(total, unit, min(PANELS, 1 << (units.bit_length() - 1)))


def attention_panels(shape: Shape) -> tuple[int, ...]:
    """Panel bounds of the attention output, in heads; a panel's columns are a multiple of `shape.unit`."""
    return _panels(shape.n_heads, math.lcm(shape.head_dim, shape.unit) // shape.head_dim)


def ffn_panels(shape: Shape, width: int) -> tuple[int, ...]:
    """Panel bounds of a feed-forward block `width` columns wide (one expert's, or a dense layer's)."""
    return _panels(width, shape.unit)


def vocab_panels(shape: Shape) -> tuple[int, ...]:
    """Panel bounds of the output head, in vocabulary rows."""
    return _panels(shape.vocab, VOCAB_UNIT if shape.vocab >= SMALL_VOCAB else 1)


def max_shards(shape: Shape) -> int:
    """The most shards that leave none without a panel of something: a power of two."""
    kinds = [attention_panels(shape), vocab_panels(shape)]
    kinds += [ffn_panels(shape, width) for width in shape.ffn_widths]
    return min(len(bounds) - 1 for bounds in kinds)


def stage_layers(shape: Shape, place: Place) -> range:
    """The layers of this rank's stage.

    Left-over layers go to the first stages, for the last one has the output head to compute.
    """
    each, extra = divmod(shape.n_layers, place.stages)
    first = place.stage * each + min(place.stage, extra)
    return range(first, first + each + (place.stage < extra))


def own_panels(panels: Sequence[int], place: Place) -> tuple[int, ...]:
    """The bounds of this shard's panels, relative to its first column: a power of two of panels."""
    mine = _own_bounds(panels, place)
    return tuple(bound - mine[0] for bound in mine)


def own_heads(shape: Shape, place: Place) -> range:
    """This shard's query heads."""
    return _own(attention_panels(shape), place)


def own_kv_heads(shape: Shape, place: Place) -> range:
    """The KV heads that this shard's query heads read: held twice where shards straddle or outnumber them."""
    heads = own_heads(shape, place)
    group = shape.n_heads // shape.n_kv_heads
    return range(heads.start // group, (heads.stop - 1) // group + 1)


def own_ffn(shape: Shape, place: Place, width: int) -> range:
    """This shard's columns of a feed-forward block `width` wide."""
    return _own(ffn_panels(shape, width), place)


def own_vocab(shape: Shape, place: Place) -> range:
    """This shard's vocabulary rows of the output head."""
    return _own(vocab_panels(shape), place)


def _own_bounds(panels: Sequence[int], place: Place) -> Sequence[int]:
    each, rest = divmod(len(panels) - 1, place.shards)
    assert rest == 0
    assert each, f"{place.shards} shards of {len(panels) - 1} panels"
    return panels[place.shard * each : (place.shard + 1) * each + 1]


def _own(panels: Sequence[int], place: Place) -> range:
    bounds = _own_bounds(panels, place)
    return range(bounds[0], bounds[-1])


def layouts(shape: Shape, ranks: int) -> list[tuple[int, int]]:
    """All (stages, shards) on which this model can be laid out over `ranks` ranks, most shards first."""
    shards = max_shards(shape)
    works = []
    while shards:
        if ranks % shards == 0 and ranks // shards <= shape.n_layers:
            works.append((ranks // shards, shards))
        shards //= 2
    return works


def choose(
    shape: Shape,
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
    works = layouts(shape, ranks)
    refused = f"{_described(shape)} cannot be laid out on {_count(ranks, 'rank')}"
    if not works:
        raise LayoutError(f"{refused}; {_ranks_that_work(shape, ranks)}.")
    fits = [pair for pair in works if stages in ("auto", pair[0]) and shards in ("auto", pair[1])]
    if not fits:
        given = ((stages, "stage"), (shards, "shard"))
        asked = " x ".join(_count(number, kind) for number, kind in given if number != "auto")
        raise LayoutError(
            f"{refused} as {asked} (ranks = stages x shards); what works: {_listed(works)}. "
            "Change [layout] or the number of ranks."
        )
    within = [pair for pair in fits if not _crosses_hosts(pair[1], ranks_per_host)]
    return (within or fits)[0]


def choose_fewer(
    shape: Shape, ranks: int, shards: int, same_shards: bool, ranks_per_host: Sequence[int] | None = None
) -> tuple[int, int]:
    """Return (stages, shards) for the `ranks` ranks that are left of a run with `shards` shards; some may be left over.

    As many ranks as can be used, and then the shards there were; the other way round if `same_shards`.
    """
    works = [pair for used in range(1, ranks + 1) for pair in layouts(shape, used)]

    def worth(pair: tuple[int, int]) -> tuple[bool, int, bool, bool, int]:
        used, same = pair[0] * pair[1], pair[1] == shards
        return same and same_shards, used, same, not _crosses_hosts(pair[1], ranks_per_host), pair[1]

    return max(works, key=worth)


def _crosses_hosts(shards: int, ranks_per_host: Sequence[int] | None) -> bool:
    """True if some shard group has ranks of two hosts."""
    border = 0
    for ranks in (ranks_per_host or ())[:-1]:
        border += ranks
        if border % shards:
            return True
    return False


def _ranks_that_work(shape: Shape, ranks: int) -> str:
    most = shape.n_layers * max_shards(shape)
    fewer = next((n for n in range(min(ranks - 1, most), 0, -1) if layouts(shape, n)), None)
    more = next((n for n in range(ranks + 1, most + 1) if layouts(shape, n)), None)
    near = [f"{n} as {_listed(layouts(shape, n))}" for n in (fewer, more) if n is not None]
    return f"the nearest that work: {'; '.join(near)}"


def _described(shape: Shape) -> str:
    layers, shards = _count(shape.n_layers, "layer"), _count(max_shards(shape), "shard")
    return f"A model with {layers} that can be cut into at most {shards}"


def _listed(works: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{_count(stages, 'stage')} x {_count(shards, 'shard')}" for stages, shards in works)


def _count(number: int | str, kind: str) -> str:
    return f"{number} {kind}{'' if number == 1 else 's'}"
