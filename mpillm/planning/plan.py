"""Plan a run: its layout, what each rank holds, and what is sent. Only the headers of the model's files are read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from socket import gethostname

import msgspec

from mpillm.catalogue import models
from mpillm.errors import IMPOSSIBLE
from mpillm.kernels import BlockType
from mpillm.model.adapters import with_adapters
from mpillm.model.cache_layout import name_of
from mpillm.model.config import ModelConfig
from mpillm.model.opening import open_described
from mpillm.partition import grid
from mpillm.planning.estimate import Estimate
from mpillm.planning.input_needs import InputNeeds
from mpillm.planning.layout import Layouts
from mpillm.planning.layout_plans import Found
from mpillm.planning.limits import cached_tokens
from mpillm.planning.machines import Machines
from mpillm.planning.needs import needs_of
from mpillm.planning.planner import Planner
from mpillm.planning.rank_plan import RankPlan, problems
from mpillm.planning.search import by_itself, search
from mpillm.planning.stage_time import sum_bytes
from mpillm.planning.wire import shards_cross_hosts, wire_in_words
from mpillm.spec import Spec, shown_bytes
from mpillm.store import readable
from mpillm.weights.source import Source, weight_types
from mpillm.words import count_of

GIB = 2**30


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The plan of a job on some ranks.

    If replicas differ, stages, shards and the values of the KV cache and of steps are those of the first replica.
    """

    model: str
    unread_lines: int  # lines of the input that are no requests
    architecture: str
    weights: list[str]  # how matrices are stored, and what they become
    missing_nbytes: int  # bytes of weights that the files do not have (yet)
    replicas: int
    reason: str  # for the number of replicas
    compared: str  # how much longer another layout would take
    left_out: list[str]  # hosts that would slow the run down
    in_reserve: list[str]  # sentences about ranks that have no core
    stages: int
    shards: int
    layouts: list[tuple[int, int]]  # possible (stages, shards) of a replica with the ranks of the first one
    layouts_of_all: list[tuple[int, int]]  # possible (stages, shards) of one replica of all ranks
    kv_type: str
    kv_tokens: int  # tokens that the KV cache holds, in sequences of max_context tokens
    kv_tokens_in_memory: int  # the part of kv_tokens that is not on disk
    kv_slots: int  # slots for sequences' states; 0 if the model has none
    step_sequences: int  # the maximum sequences of a step
    step_tokens: int  # the maximum tokens of a step
    max_context: int
    wire: dict[str, float]  # bytes per token through the model, of all ranks, by kind of message
    wire_f32: float  # the sum of `wire` if all messages were float32
    wire_of_shards: str  # the wire between shards, and the reason
    ranks: list[RankPlan]
    free: list[int]  # bytes of free memory for each rank; empty if the hosts are not known
    time: Estimate
    gains: dict[str, float]  # by resource: how many times as fast the job is with more of it
    problems: list[str]  # sentences that say why the job cannot run


def make(spec: Spec, ranks: int, machines: Machines | None = None) -> Plan:
    """Plan a job on `ranks` ranks; MpillmError if its model cannot be read or laid out on them.

    `machines` has the hosts of the ranks (None: all ranks are on one host).
    """
    path = models.path_to_plan(spec.model_on(gethostname()))
    machines = machines or Machines([ranks], [sys.maxsize] * ranks)
    with (
        closing(open_described(path, spec.quantize)) as source,
        with_adapters(spec.adapters, source) as config,
    ):
        return make_plan(spec, source, config, machines)


def make_plan(spec: Spec, source: Source, config: ModelConfig, machines: Machines) -> Plan:
    """Plan the job `spec` on these machines; LayoutError if the model cannot be laid out on them.

    Hosts that would slow the run down are left out.
    """
    asked = needs_of(spec, config, source)
    planner, in_reserve = Planner(source, config), list[str]()
    if by_itself(spec):
        machines, in_reserve = machines.computing(spec.layout.threads)
    names = machines.host_names()
    layouts = Layouts(spec, planner, spec.layout.replicas, asked.lines or None, asked=asked)
    best, without = search(layouts, machines)
    machines, chosen, time = best.machines, best.chosen, best.time
    found = chosen.replicas
    first, plans = best.plans[0], [rank for replica in best.plans for rank in replica.ranks]
    stages, shards, max_context = found[0].stages, found[0].shards, first.max_context
    capacity, windows = first.capacity, first.caches[0].windows
    shared = chosen.wire == "f32" and not shards_cross_hosts(machines, found)
    wrong = [problem for replica in best.plans for problem in problems(spec, replica)]
    return Plan(
        model=spec.model_on(gethostname()),
        unread_lines=asked.unread,
        architecture=config.architecture,
        weights=weight_types(source),
        missing_nbytes=_missing(source),
        replicas=len(found),
        reason=chosen.reason,
        compared=chosen.compared,
        left_out=[names[host] for host in without],
        in_reserve=in_reserve,
        stages=stages,
        shards=shards,
        layouts=grid.layouts(config, len(found[0].ranks)),
        layouts_of_all=grid.layouts(config, len(plans)),
        kv_type=name_of(first.caches[0].kv_type),
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
            BlockType[chosen.wire.upper()],
            BlockType[spec.wire.between_stages.upper()],
            shared,
        ),
        wire_f32=sum(wire_bytes(config, stages, shards, BlockType.F32, BlockType.F32, shared).values()),
        wire_of_shards=wire_in_words(chosen.wire, shards, chosen.wire_reason) if shards > 1 else "",
        ranks=plans,
        free=[] if sys.maxsize in machines.free else list(machines.free),
        time=time,
        gains={} if wrong else dict(_gains(spec, planner, machines, asked, time)),
        problems=list(dict.fromkeys([*wrong, *_too_large(machines, plans)])),
    )


def laid_out(spec: Spec, planner: Planner, machines: Machines, asked: InputNeeds) -> Found:
    """Return the best layout on all of these machines, with its plans and its time; LayoutError if none is possible."""
    if by_itself(spec):
        machines, _ = machines.computing(spec.layout.threads)
    return Layouts(spec, planner, spec.layout.replicas, asked.lines or None, asked=asked).choose(machines)


def _missing(source: Source) -> int:
    """Return the bytes of weights that the files do not have, because a plan needs only their headers."""
    pieces = {(path, begin, begin + nbytes) for path, begin, nbytes in source.extents()}
    sizes = {path: path.stat().st_size for path in {path for path, _, _ in pieces}}
    return sum(max(0, end - max(begin, sizes[path])) for path, begin, end in pieces)


def _too_large(machines: Machines, plans: list[RankPlan]) -> Iterator[str]:
    """If ranks would hold more than is free: a sentence on the rank that lacks most, and the number of others."""
    lacking = {rank.rank: rank for rank in plans if rank.held > machines.free[rank.rank]}
    if not lacking:
        return
    rank = max(lacking.values(), key=lambda one: one.held - machines.free[one.rank])
    where = f" on {machines.names[rank.rank]}" if machines.names else ""
    others = (
        f" ({count_of(len(lacking) - 1, 'other rank')} would hold too much as well)"
        if len(lacking) > 1
        else ""
    )
    free = shown_bytes(machines.free[rank.rank])
    yield (
        f"Rank {rank.rank}{where} would hold {shown_bytes(rank.held)}, and {free} are free{others}; "
        "lower memory.weights or memory.kv, or use more ranks."
    )


def _gains(
    spec: Spec, planner: Planner, machines: Machines, asked: InputNeeds, now: Estimate
) -> Iterator[tuple[str, float]]:
    """Yield the gains with one more host, with more memory on each rank, and so on, as factors of the speed."""
    memory = spec.memory
    if not isinstance(memory.kv, (str, int)) or not isinstance(memory.weights, (str, int)):
        return  # ranks have different budgets, so there is not one to raise
    budget = memory.weights_bytes  # None: all weights are in memory
    weights = memory if budget is None else msgspec.structs.replace(memory, weights=budget + GIB)
    more = {
        "1 GiB more of memory.kv": (msgspec.structs.replace(memory, kv=memory.kv_bytes + GIB), machines),
        "1 GiB more of memory.weights": (weights, machines),
    }
    more["one more host like the last one"] = memory, machines.with_another()
    if len(machines.ranks_per_host) > 1:
        more["twice the network's rate"] = memory, machines.with_faster_network(2)
    for name, (changed, on) in more.items():
        if changed is memory and on is machines:
            yield name, 1.0
            continue
        with suppress(*IMPOSSIBLE):
            job = msgspec.structs.replace(spec, memory=changed)
            yield name, now.seconds / laid_out(job, planner, on, asked).time.seconds


def wire_bytes(
    config: ModelConfig,
    stages: int,
    shards: int,
    activations: BlockType,
    between_stages: BlockType,
    shared: bool,
) -> dict[str, float]:
    """Return the bytes of activations that all ranks together send for each token, by kind of message.

    The shards of a stage sum rows twice a layer: after attention and after the MLP. If they share memory, they read
    each other's rows. Between stages, each shard sends the hidden state to the same shard of the next stage.
    """
    in_memory = shards * (shards - 1) * activations.row_bytes(config.hidden)
    a_sum = in_memory if shared else sum_bytes(activations, config.hidden, shards)
    return {
        "all_reduce": 2.0 * config.n_layers * a_sum,
        "pipe": float((stages - 1) * shards * between_stages.row_bytes(config.hidden)),
    }


def as_json(plan: Plan) -> str:
    """Return the plan as JSON."""
    return readable.as_json(plan).decode()
