"""Compute what each rank of a replica will hold, from the model's headers, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
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
from mpillm.planning.input_needs import InputNeeds
from mpillm.planning.limits import (
    cache_capacity,
    cache_in_file,
    cache_in_memory,
    step_size,
    used_capacity,
)
from mpillm.planning.machines import Machines
from mpillm.planning.rank_plan import RankPlan, ReplicaPlan
from mpillm.planning.step_time import RankWork
from mpillm.planning.weights_share import WeightsShare, weights_share
from mpillm.spec import Spec, tightest
from mpillm.weights.plan import PagePlan
from mpillm.weights.source import Source, head_plans, layer_plans


class Planner:
    """Plans replicas of a model. What equal places hold is computed once."""

    def __init__(self, source: Source, config: ModelConfig) -> None:
        self.source, self.config = source, config
        self._rows = activations_of(source, config)
        self._known: dict[tuple[Any, ...], Any] = {}
        self._works = list[RankWork]()

    @cached_property
    def _kinds(self) -> tuple[int, ...]:
        return _kinds_of_layers(self.source, self.config)

    def replicas(
        self,
        spec: Spec,
        replicas: Sequence[Replica],
        asked: InputNeeds,
        machines: Machines,
        shares: Sequence[float],
        known: dict[tuple[Any, ...], ReplicaPlan] | None = None,
    ) -> Iterator[ReplicaPlan]:
        """Yield the plans of all replicas. Equal replicas are planned once, and their plans are kept in `known`.

        `asked` is what the input asks for, and `shares` has the part of its lines that each replica is to compute. The
        plans in `known` are those of one job, on any machines.
        """
        hosts = machines.names
        known = {} if known is None else known
        alike = spec.on_rank(0, hosts[0] if hosts else "") is spec  # all ranks have the same budgets
        for number, (replica, part) in enumerate(zip(replicas, shares, strict=True)):
            # The first replica differs, because its rank 0 holds the input too.
            where = () if alike else (replica.first, *(hosts[rank] for rank in replica.ranks if hosts))
            several = machines.several_hosts
            key = number == 0, replica.stages, replica.shards, replica.layers, where, several, part
            if key not in known:
                known[key] = self._replica(spec, number, replica, asked, machines, part)
            found = known[key]
            ranks = [
                msgspec.structs.replace(plan, rank=rank, replica=number)
                for plan, rank in zip(found.ranks, replica.ranks, strict=True)
            ]
            yield replace(found, ranks=ranks)

    def _replica(
        self,
        spec: Spec,
        number: int,
        replica: Replica,
        asked: InputNeeds,
        machines: Machines,
        part: float,
    ) -> ReplicaPlan:
        config, places, hosts = self.config, replica.places, machines.names
        specs = [spec.on_rank(rank, hosts[rank] if hosts else "") for rank in replica.ranks]
        spec = tightest(specs)
        caches = self._caches(places, spec.memory.kv_type)
        shares = [
            self._share(one, place, cache) for one, place, cache in zip(specs, places, caches, strict=True)
        ]
        read = [share.streamed for share in shares]
        # One stage stands for all, because the bytes of a row depend only on the shard, and on adapters of the layers.
        step = step_size(spec, self._rows, places if config.adapters else places[: replica.shards], any(read))
        windows, stages = caches[0].windows, replica.stages
        budgets = [one.memory.kv_bytes for one in specs]
        capacity = cache_capacity(spec, caches, read, step.sequences * stages, budgets)
        max_context = spec.memory.context(config.max_position)
        used = used_capacity(capacity, config, step, windows, max_context, stages, asked, part)
        needed = used.needed(len(windows), asked, step, stages)  # if it had to compute all
        kept = memory.KEPT_BY_LEADERS if number else asked.kept(step.sequences * stages, config.vocab)
        rows = memory.step_rows(asked, spec, config, step, used, windows, stages, any(read))
        drafting = draft.nbytes(spec, config, asked, stages)
        plans = [
            _rank(
                one,
                config,
                number,
                place,
                cache,
                needed,
                used.blocks,
                share,
                self._activations(place, rows),
                self._process(one, place, share, kept, machines.several_hosts) + share.beyond,
                0 if place.rank else drafting,
            )
            for one, place, cache, share in zip(specs, places, caches, shares, strict=True)
        ]
        return ReplicaPlan(caches, step, capacity, max_context, plans, [share.work for share in shares])

    def _share(self, spec: Spec, place: Place, cache: CacheLayout) -> WeightsShare:
        """Return the weights that the rank at a place holds, and its work in a step."""
        key = (
            "share",
            spec.memory.weights_bytes,
            spec.memory.policy,
            spec.memory.loader,
            spec.memory.kv_type,
            *self._like(place),
        )
        if key not in self._known:
            share = weights_share(spec, self.config, place, self._pages(place), cache, self.source.in_file)
            # Equal works, as most shards have, are one object, so that their time is computed once.
            work = next((work for work in self._works if work == share.work), share.work)
            if work is share.work:
                self._works.append(work)
            self._known[key] = replace(share, work=work)
        found: WeightsShare = self._known[key]
        return found

    def _pages(self, place: Place) -> list[PagePlan]:
        """Return the pages of `rank_plans`; each layer has the pages of the first layer of its kind."""
        pages = []
        for layer in grid.stage_layers(self.config.n_layers, place):
            key = "pages", self._kinds[layer], place.shards, place.shard
            if key not in self._known:
                self._known[key] = layer_plans(self.config, self._kinds[layer], place, self.source)
            pages += self._known[key]
        return pages + head_plans(self.config, place, self.source)

    def _caches(self, places: Sequence[Place], kv_type: str) -> list[CacheLayout]:
        """Return the layouts of `rank_layouts`, each computed once."""
        keys = [
            ("cache", kv_type, place.shards, place.shard, grid.stage_layers(self.config.n_layers, place))
            for place in places
        ]
        unknown = {key: place for key, place in zip(keys, places, strict=True) if key not in self._known}
        if unknown:
            found = rank_layouts(self.config, list(unknown.values()), kv_type)
            self._known.update(zip(unknown, found, strict=True))
        return [self._known[key] for key in keys]

    def _activations(self, place: Place, rows: memory.Rows) -> int:
        key = ("activations", rows, place.stages, *self._like(place))
        if key not in self._known:
            self._known[key] = memory.activations(self._rows, place, rows)
        return int(self._known[key])

    def _process(self, spec: Spec, place: Place, share: WeightsShare, kept: int, network: bool) -> int:
        streams = share.streamed > 0
        later = memory.taken_later(spec, self.source, place, streams)
        return memory.process(self.source, self.config, place, share.pages, kept, later, streams, network)

    def _like(self, place: Place) -> tuple[Any, ...]:
        """Return a key that is equal for places with equal layers."""
        layers = grid.stage_layers(self.config.n_layers, place)
        kinds = layers if self.config.adapters else self._kinds[layers.start : layers.stop]
        return kinds, place.is_last_stage, place.shards, place.shard


def _kinds_of_layers(source: Source, config: ModelConfig) -> tuple[int, ...]:
    """For each layer, the number of the first layer whose pages have the same sizes and types."""
    types: dict[int, list[tuple[str, int, BlockType]]] = {}
    for key, info in source.tensors.items():
        types.setdefault(key.layer, []).append((key.role, key.expert, info.type))
    kinds: dict[tuple[Any, ...], int] = {}
    return tuple(
        kinds.setdefault((config.layers[layer], tuple(sorted(types.get(layer, ())))), layer)
        for layer in range(config.n_layers)
    )


def _rank(
    spec: Spec,
    config: ModelConfig,
    replica: int,
    place: Place,
    cache: CacheLayout,
    needed: tuple[int, int],
    capacity: int,
    share: WeightsShare,
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
        weights_share=share.total,
        weights_held=share.held,
        weights_minimum=share.minimum,
        weights_streamed=share.streamed,
        adapters=config.adapters_nbytes(place),
        draft=drafting,
        kv_token=cache.token_nbytes,
        kv_state=cache.state_nbytes,
        kv_held=cache_in_memory(spec, cache, *needed, capacity),
        kv_in_file=cache_in_file(spec, cache, *needed),
        activations=activations,
        process=process,
    )
