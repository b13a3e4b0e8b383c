"""What each rank of a replica will hold, computed from the model's headers before anything is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from mpillm.kernels import BlockType
from mpillm.model.activations import activations_of
from mpillm.model.cache_layout import CacheLayout, rank_layouts
from mpillm.model.config import ModelConfig
from mpillm.partition import grid
from mpillm.partition.grid import Place
from mpillm.partition.replicas import Replica
from mpillm.planning import draft, memory
from mpillm.planning.input_memory import InputNeeds
from mpillm.planning.limits import (
    CacheCapacity,
    StepSize,
    cache_capacity,
    cache_in_file,
    cache_in_memory,
    cached_tokens,
    step_size,
)
from mpillm.planning.step_time import AttentionWork, RankWork
from mpillm.spec import Spec, shown_bytes, tightest
from mpillm.weights.inventory import HEAD
from mpillm.weights.paging.weights import minimum_budget, streamed, streamed_experts
from mpillm.weights.plan import PagePlan
from mpillm.weights.source import Source, rank_plans


class RankPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank will hold, in bytes."""

    rank: int
    replica: int
    stage: int
    shard: int
    layers: tuple[int, int]  # first, and the one behind the last
    weights_share: int  # all that it is responsible for
    weights_held: int  # at most
    weights_minimum: int  # the smallest memory.weights that works here
    weights_streamed: int  # read anew for every step
    adapters: int  # all of them
    draft: int  # a draft model and its cache, at most
    kv_token: int  # for each token in the cache
    kv_state: int  # for each sequence, however long
    kv_held: int  # at most
    kv_in_file: int  # on disk, at most
    activations: int  # of a step's rows, at most
    process: int  # Python, MPI, libraries, tokenizer, at most

    @property
    def held(self) -> int:
        """The sum of all."""
        held = self.weights_held + self.adapters + self.draft + self.kv_held
        return held + self.activations + self.process


@dataclass(frozen=True)
class ReplicaPlan:
    """What the ranks of a replica will hold."""

    caches: list[CacheLayout]
    step: StepSize
    capacity: CacheCapacity
    max_context: int
    ranks: list[RankPlan]
    works: list[RankWork]  # of each rank

    @property
    def cached_tokens(self) -> int:
        """Tokens that the KV cache holds in sequences of `max_context` tokens; 0 if the model keeps none."""
        return cached_tokens(self.capacity.blocks, self.caches[0].windows, self.max_context)


def replica_plan(
    spec: Spec,
    source: Source,
    config: ModelConfig,
    number: int,
    replica: Replica,
    asked: InputNeeds,
    hosts: Sequence[str] = (),
) -> ReplicaPlan:
    """What the ranks of replica `number` will hold; `asked` is what the input asks for, `hosts` each rank's host."""
    places = replica.places
    specs = [spec.on_rank(rank, hosts[rank] if hosts else "") for rank in replica.ranks]
    spec = tightest(specs)
    caches = rank_layouts(config, places, spec.memory.kv_type)
    pages = [rank_plans(config, place, source) for place in places]
    shares = [_weights(one, own) for one, own in zip(specs, pages, strict=True)]
    read = [share["streamed"] for share in shares]
    rows = activations_of(source, config)
    step = step_size(spec, rows, places, any(read))
    budgets = [one.memory.kv_bytes for one in specs]
    capacity = cache_capacity(spec, caches, read, step.sequences * replica.stages, budgets)
    needed = capacity.needed(len(caches[0].windows), asked)
    drafting = draft.nbytes(spec, config)
    kept = 0 if number else asked.kept(step.sequences * replica.stages)
    plans = [
        _rank(
            one,
            config,
            number,
            place,
            cache,
            needed,
            capacity.blocks,
            share,
            memory.activations(rows, place, min(step.tokens, asked.rows)),
            memory.process(source, config, place, [page.nbytes for page in own], kept),
            0 if place.rank else drafting,
        )
        for one, place, own, cache, share in zip(specs, places, pages, caches, shares, strict=True)
    ]
    works = [
        work_of(config, place, own, cache, share["streamed"], share["streamed_experts"])
        for place, own, cache, share in zip(places, pages, caches, shares, strict=True)
    ]
    return ReplicaPlan(
        caches, step, capacity, min(spec.memory.max_context, config.max_position), plans, works
    )


def replica_plans(
    spec: Spec,
    source: Source,
    config: ModelConfig,
    replicas: Sequence[Replica],
    asked: InputNeeds,
    hosts: Sequence[str] = (),
    known: dict[tuple[Any, ...], ReplicaPlan] | None = None,
) -> Iterator[ReplicaPlan]:
    """The plans of all replicas; those that are alike are worked out once, and kept in `known`."""
    known = {} if known is None else known
    alike = spec.on_rank(0, hosts[0] if hosts else "") is spec  # one value of each budget for all ranks
    for number, replica in enumerate(replicas):
        # The first one has the input as well.
        key = (number == 0, replica.stages, replica.shards, replica.layers, 0 if alike else replica.first)
        if key not in known:
            known[key] = replica_plan(spec, source, config, number, replica, asked, hosts)
        found = known[key]
        ranks = [
            msgspec.structs.replace(plan, rank=rank, replica=number)
            for plan, rank in zip(found.ranks, replica.ranks, strict=True)
        ]
        yield replace(found, ranks=ranks)


def work_of(
    config: ModelConfig,
    place: Place,
    pages: Sequence[PagePlan],
    cache: CacheLayout,
    streamed: int,
    streamed_experts: int,
) -> RankWork:
    """What a step is for the rank at `place`, which has `pages` and `cache`; it streams so many bytes of weights."""
    counts: dict[str, Counter[BlockType]] = {"head": Counter(), "expert": Counter(), "layer": Counter()}
    for page in pages:
        kind = "head" if page.kind == HEAD else "expert" if page.expert >= 0 else "layer"
        for type, values in page.values.items():
            counts[kind][type] += values
    operations = (
        4 * config.hidden // place.shards
    )  # of a row and a token before it: about the width of all heads
    attention = Counter[int]()
    for layer in filter(None, cache.tokens):
        attention[cache.windows[layer.group]] += 1
    nbytes = cache.token_nbytes // max(sum(attention.values()), 1)
    return RankWork(
        layers=len(grid.stage_layers(config.n_layers, place)),
        products=counts["layer"],
        experts=counts["expert"],
        head=counts["head"],
        expert_share=config.expert_share,
        streamed=streamed,
        streamed_experts=streamed_experts,
        attention=[AttentionWork(window, n * nbytes, n * operations) for window, n in attention.items()],
    )


def problems(spec: Spec, replica: ReplicaPlan) -> Iterator[str]:
    """A sentence for each thing that keeps a replica from running."""
    minimum = max(rank.weights_minimum for rank in replica.ranks)
    if any(rank.weights_held < rank.weights_minimum for rank in replica.ranks):
        yield (
            f"memory.weights = {spec.memory.weights} is too small: some rank needs at least {minimum} bytes "
            f"({shown_bytes(minimum)}) for two neighbouring pages; raise it or use more shards."
        )
    if problem := replica.capacity.problem(spec, replica.caches):
        yield problem


def _weights(spec: Spec, pages: Sequence[PagePlan]) -> dict[str, int]:
    share = sum(page.nbytes for page in pages)
    minimum = minimum_budget(pages)
    budget = spec.memory.weights_bytes
    return {
        "share": share,
        "held": share if budget is None else min(budget, share),
        "minimum": minimum,
        "streamed": streamed(pages, budget, spec.memory.policy),
        "streamed_experts": streamed_experts(pages, budget),
    }


def _rank(
    spec: Spec,
    config: ModelConfig,
    replica: int,
    place: Place,
    cache: CacheLayout,
    needed: tuple[int, int],
    capacity: int,
    weights: dict[str, int],
    activations: int,
    process: int,
    drafting: int,
) -> RankPlan:
    layers = grid.stage_layers(config.n_layers, place)
    return RankPlan(
        rank=place.first + place.rank,
        replica=replica,
        stage=place.stage,
        shard=place.shard,
        layers=(layers.start, layers.stop),
        weights_share=weights["share"],
        weights_held=weights["held"],
        weights_minimum=weights["minimum"],
        weights_streamed=weights["streamed"],
        adapters=config.adapters_nbytes(place),
        draft=drafting,
        kv_token=cache.token_nbytes,
        kv_state=cache.state_nbytes,
        kv_held=cache_in_memory(spec, cache, *needed, capacity),
        kv_in_file=cache_in_file(spec, cache, *needed),
        activations=activations,
        process=process,
    )
