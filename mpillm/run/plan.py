"""Before a run: which layout, what each rank will hold, what will travel. Reads the model's headers, and no weights."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing

import msgspec

from mpillm.kernels import BlockType
from mpillm.model.adapters import Adapters
from mpillm.model.config import ModelConfig
from mpillm.model.opening import config_of, open_source
from mpillm.partition import grid
from mpillm.run import catalogue, layout
from mpillm.run.layout import Machines
from mpillm.run.limits import cached_tokens, step_description
from mpillm.run.rank_plan import RankPlan, problems, replica_plan
from mpillm.spec import Spec, shown_bytes
from mpillm.store import readable
from mpillm.weights.source import Source, weight_types


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A job on so many ranks. `problems` has a sentence for each thing that keeps it from running."""

    model: str
    architecture: str
    weights: list[str]  # how matrices are stored, and what they become
    replicas: int
    reason: str  # for as many replicas
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


def make(spec: Spec, ranks: int, machines: Machines | None = None) -> Plan:
    """Return what a job comes to on so many ranks; MpillmError if its model cannot be read or laid out on them.

    `machines` says where the ranks are; without it they are on one host.
    """
    path = catalogue.resolve(spec.model)
    machines = machines or Machines([ranks], [sys.maxsize] * ranks)
    with closing(open_source(path, spec.quantize)) as source:
        config = config_of(source)
        with closing(Adapters(spec.adapters, source, config)) as adapters:
            return make_plan(spec, source, config, adapters, machines)


def make_plan(
    spec: Spec, source: Source, config: ModelConfig, adapters: Adapters, machines: Machines
) -> Plan:
    """Return what `spec` comes to on these ranks; LayoutError if the model cannot be laid out on them."""
    chosen = layout.choose(spec, source, config, adapters, machines, spec.layout.replicas)
    found = chosen.replicas
    laid_out = [
        replica_plan(spec, source, config, adapters, number, replica) for number, replica in enumerate(found)
    ]
    first, plans = laid_out[0], [rank for replica in laid_out for rank in replica.ranks]
    stages, shards, max_context = found[0].stages, found[0].shards, first.max_context
    capacity, windows = first.capacity, first.caches[0].windows
    return Plan(
        model=spec.model,
        architecture=config.architecture,
        weights=weight_types(source),
        replicas=len(found),
        reason=chosen.reason,
        stages=stages,
        shards=shards,
        layouts=grid.layouts(config, len(found[0].ranks)),
        kv_type=first.caches[0].kv_type.name.lower(),
        kv_tokens=first.cached_tokens,
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
        problems=list(dict.fromkeys(problem for replica in laid_out for problem in problems(spec, replica))),
    )


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
    if plan.replicas > 1:
        yield f"          {plan.reason}"
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
    adapted = any(rank.adapters for rank in plan.ranks)
    rest = ["KV per token", "KV held", "a step's rows", "process", "in all"]
    rows = [[*head, *(["adapters"] if adapted else []), *rest]]
    for rank in plan.ranks:
        weights = [rank.weights_share, rank.weights_held, rank.weights_minimum, rank.weights_streamed]
        weights += [rank.adapters] if adapted else []
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
