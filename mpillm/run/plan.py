"""Before a run: which layout, what each rank will hold, what will travel. Reads the model's headers, and no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import msgspec

from mpillm.kernels import BlockType
from mpillm.model.activations import activations_of
from mpillm.model.cache_layout import CacheLayout, rank_layouts
from mpillm.model.config import ModelConfig
from mpillm.model.opening import config_of, open_source
from mpillm.partition import grid, replicas
from mpillm.partition.grid import Place
from mpillm.partition.replicas import Replica
from mpillm.run import catalogue, memory
from mpillm.run.input_memory import input_bytes
from mpillm.run.limits import (
    CacheCapacity,
    StepSize,
    cache_capacity,
    cache_in_file,
    cache_in_memory,
    cached_tokens,
    step_description,
    step_size,
)
from mpillm.spec import Spec, shown_bytes
from mpillm.store import readable
from mpillm.weights.paging.weights import minimum_budget, streamed
from mpillm.weights.plan import PagePlan
from mpillm.weights.source import Source, rank_plans, weight_types


class RankPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank will hold. Bytes."""

    rank: int
    replica: int
    stage: int
    shard: int
    layers: tuple[int, int]  # first, and the one behind the last
    weights_share: int  # all that it is responsible for
    weights_held: int  # at most
    weights_minimum: int  # the smallest memory.weights that works here
    weights_streamed: int  # read anew for every step
    kv_token: int  # for each token in the cache
    kv_state: int  # for each sequence, however long
    kv_held: int  # at most
    kv_in_file: int  # on disk, at most
    activations: int  # of a step's rows, at most
    process: int  # Python, MPI, libraries, tokenizer, at most

    @property
    def held(self) -> int:
        """All of it together."""
        return self.weights_held + self.kv_held + self.activations + self.process


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A job on so many ranks. `problems` has a sentence for each thing that keeps it from running."""

    model: str
    architecture: str
    weights: list[str]  # how matrices are stored, and what they become
    replicas: int
    stages: int  # of the first replica, as what follows where replicas differ
    shards: int
    layouts: list[tuple[int, int]]  # all that work for a replica of so many ranks, (stages, shards)
    kv_type: str
    kv_tokens: int  # that the KV cache holds, in sequences of max_context tokens
    kv_tokens_in_memory: int  # of those; the others lie on disk
    kv_slots: int  # for sequences' states, 0 if the model has none
    step_sequences: int  # in one step, at most
    step_tokens: int
    max_context: int
    wire: dict[str, float]  # bytes per token through the model, all ranks together, by kind of message
    wire_f32: float  # what all of it would be as float32
    ranks: list[RankPlan]
    problems: list[str]


def make(spec: Spec, ranks: int) -> Plan:
    """Return what a job comes to on so many ranks; MpillmError if its model cannot be read or laid out on them."""
    path = catalogue.resolve(spec.model)
    with closing(open_source(path, spec.quantize)) as source:
        return make_plan(spec, source, config_of(source), ranks)


def make_plan(
    spec: Spec,
    source: Source,
    config: ModelConfig,
    ranks: int,
    ranks_per_host: Sequence[int] | None = None,
) -> Plan:
    """Return what `spec` comes to on so many ranks; LayoutError if the model cannot be laid out on them."""
    found = replicas.choose(
        config, ranks, spec.layout.replicas, spec.layout.stages, spec.layout.shards, ranks_per_host
    )
    laid_out = [_replica(spec, source, config, number, replica) for number, replica in enumerate(found)]
    first, plans = laid_out[0], [rank for replica in laid_out for rank in replica.ranks]
    stages, shards, max_context = found[0].stages, found[0].shards, first.max_context
    capacity, windows = first.capacity, first.caches[0].windows
    return Plan(
        model=spec.model,
        architecture=config.architecture,
        weights=weight_types(source),
        replicas=len(found),
        stages=stages,
        shards=shards,
        layouts=grid.layouts(config, len(found[0].ranks)),
        kv_type=first.caches[0].kv_type.name.lower(),
        kv_tokens=cached_tokens(capacity.blocks, windows, max_context),
        kv_tokens_in_memory=cached_tokens(capacity.blocks_in_memory, windows, max_context),
        kv_slots=capacity.slots,
        step_sequences=capacity.sequences(first.step.sequences, windows),
        step_tokens=first.step.tokens,
        max_context=max_context,
        wire=wire_bytes(
            config,
            stages,
            shards,
            BlockType[spec.wire.activations.upper()],
            BlockType[spec.wire.between_stages.upper()],
        ),
        wire_f32=sum(wire_bytes(config, stages, shards, BlockType.F32, BlockType.F32).values()),
        ranks=plans,
        problems=list(
            dict.fromkeys(
                problem
                for replica in laid_out
                for problem in _problems(spec, replica.ranks, replica.capacity, replica.caches)
            )
        ),
    )


@dataclass(frozen=True)
class _ReplicaPlan:
    """What the ranks of a replica will hold."""

    caches: list[CacheLayout]
    step: StepSize
    capacity: CacheCapacity
    max_context: int
    ranks: list[RankPlan]


def _replica(spec: Spec, source: Source, config: ModelConfig, number: int, replica: Replica) -> _ReplicaPlan:
    places = replica.places
    caches = rank_layouts(config, places, spec.memory.kv_type)
    pages = [rank_plans(config, place, source) for place in places]
    shares = [_weights(spec, own) for own in pages]
    read = [share["streamed"] for share in shares]
    rows = activations_of(source, config)
    step = step_size(spec, rows, places, any(read))
    capacity = cache_capacity(spec, caches, read, step.sequences * replica.stages)
    kept = 0 if number else input_bytes(spec, config.hidden, step.sequences * replica.stages)
    plans = [
        _rank(
            spec,
            config,
            number,
            place,
            cache,
            capacity,
            share,
            memory.activations(rows, place, step.tokens),
            memory.process(source, config, place, len(own), kept),
        )
        for place, own, cache, share in zip(places, pages, caches, shares, strict=True)
    ]
    return _ReplicaPlan(caches, step, capacity, min(spec.memory.max_context, config.max_position), plans)


def wire_bytes(
    config: ModelConfig, stages: int, shards: int, activations: BlockType, between_stages: BlockType
) -> dict[str, float]:
    """Bytes of activations that all ranks together send for each token, by kind of message.

    In a stage every shard sends its part to every other one, twice a layer (after attention and after the
    feed-forward block); between stages every shard sends the hidden state to its like.
    """
    return {
        "all_reduce": float(
            2 * config.n_layers * shards * (shards - 1) * activations.row_bytes(config.hidden)
        ),
        "pipe": float((stages - 1) * shards * between_stages.row_bytes(config.hidden)),
    }


def _weights(spec: Spec, pages: Sequence[PagePlan]) -> dict[str, int]:
    share = sum(page.nbytes for page in pages)
    minimum = minimum_budget(pages)
    budget = spec.memory.weights_bytes
    return {
        "share": share,
        "held": share if budget is None else min(budget, share),
        "minimum": minimum,
        "streamed": streamed(pages, budget, spec.memory.policy),
    }


def _rank(
    spec: Spec,
    config: ModelConfig,
    replica: int,
    place: Place,
    cache: CacheLayout,
    capacity: CacheCapacity,
    weights: dict[str, int],
    activations: int,
    process: int,
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
        kv_token=cache.token_nbytes,
        kv_state=cache.state_nbytes,
        kv_held=cache_in_memory(spec, cache, capacity.blocks, capacity.states),
        kv_in_file=cache_in_file(spec, cache, capacity.blocks, capacity.states),
        activations=activations,
        process=process,
    )


def _problems(
    spec: Spec, ranks: Sequence[RankPlan], capacity: CacheCapacity, caches: Sequence[CacheLayout]
) -> Iterator[str]:
    budget = spec.memory.weights_bytes
    minimum = max(rank.weights_minimum for rank in ranks)
    if budget is not None and budget < minimum:
        yield (
            f"memory.weights = {spec.memory.weights} is too small: some rank needs at least {minimum} bytes "
            f"({shown_bytes(minimum)}) for two neighbouring pages; raise it or use more shards."
        )
    if problem := capacity.problem(spec, caches):
        yield problem


def as_json(plan: Plan) -> str:
    """The plan for programs."""
    return readable.as_json(plan).decode()


def as_text(plan: Plan) -> str:
    """The plan as a table for people."""
    return "\n".join(_table(plan))


def _table(plan: Plan) -> Iterator[str]:
    ranks = len(plan.ranks)
    others = [pair for pair in plan.layouts if pair != (plan.stages, plan.shards)]
    yield f"model     {plan.model} ({plan.architecture})"
    yield f"weights   {', '.join(plan.weights)}"
    yield f"layout    {_layouts(plan)} on {_count(ranks, 'rank')}"
    if others:
        yield f"          also possible: {'; '.join(_layout(*pair) for pair in others)}"
    contexts = plan.kv_tokens / plan.max_context
    yield (
        f"KV cache  {plan.kv_type}, holds {plan.kv_tokens} tokens: {contexts:.1f} requests of "
        f"{plan.max_context} tokens at once"
    )
    if in_file := max(rank.kv_in_file for rank in plan.ranks):
        yield (
            f"          {plan.kv_tokens_in_memory} in memory; beyond, up to {shown_bytes(in_file)} a rank lie on disk"
        )
    yield "batch     " + step_description(
        plan.step_sequences, plan.step_tokens, max(rank.weights_streamed for rank in plan.ranks)
    )
    total = sum(plan.wire.values())
    if total:
        parts = ", ".join(f"{kind} {count:.0f}" for kind, count in plan.wire.items() if count)
        saved = 100 * (1 - total / plan.wire_f32)
        less = f"; {saved:.1f} % less than float32" if saved else ""
        yield f"wire      {total:.0f} bytes per token, all ranks together ({parts}{less})"
    yield ""
    head = [
        "rank",
        "replica",
        "stage",
        "shard",
        "layers",
        "weights: share",
        "held",
        "at least",
        "read per step",
    ]
    rows = [[*head, "KV per token", "KV held", "a step's rows", "process", "in all"]]
    for rank in plan.ranks:
        weights = [rank.weights_share, rank.weights_held, rank.weights_minimum, rank.weights_streamed]
        sizes = [*weights, rank.kv_token, rank.kv_held, rank.activations, rank.process, rank.held]
        layers = f"{rank.layers[0]}-{rank.layers[1] - 1}"
        rows.append(
            [
                str(rank.rank),
                str(rank.replica),
                str(rank.stage),
                str(rank.shard),
                layers,
                *map(shown_bytes, sizes),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    yield ""
    together = shown_bytes(sum(rank.held for rank in plan.ranks))
    on_one = f": on one machine {together} for all of them" if ranks > 1 else ""
    yield from plan.problems or [f"It fits, where every rank finds the memory of its last column{on_one}."]


def _layouts(plan: Plan) -> str:
    """The replicas, with their number of ranks where they have not all the same."""
    own = _layout(plan.stages, plan.shards)
    if plan.replicas == 1:
        return own
    sizes = Counter(rank.replica for rank in plan.ranks)
    if len(set(sizes.values())) == 1:
        return f"{plan.replicas} replicas of {own}"
    return f"{plan.replicas} replicas of {', '.join(map(str, sizes.values()))} ranks, the first of {own}"


def _layout(stages: int, shards: int) -> str:
    return f"{_count(stages, 'stage')} x {_count(shards, 'shard')}"


def _count(number: int, kind: str) -> str:
    return f"{number} {kind}{'' if number == 1 else 's'}"
