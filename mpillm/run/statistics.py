"""The statistics of a rank at the end of a run: its memory, messages and waits."""

from __future__ import annotations

from dataclasses import asdict

import msgspec

from mpillm import kernels
from mpillm.partition import grid
from mpillm.planning import draft, memory
from mpillm.planning.limits import CacheCapacity, StepSize, cache_in_memory
from mpillm.run.session import Session
from mpillm.store.report import RankStatistics
from mpillm.weights.page import Page
from mpillm.weights.paging.cache import WeightCache
from mpillm.weights.paging.experts import ExpertCache


def rank_statistics(session: Session) -> RankStatistics:
    """Return this rank's memory, messages and waits since the session was created."""
    weights, messages = session.weights, session.counters.as_dict()
    waited = {kind: float(count["seconds"]) for kind, count in messages.items()}
    inside = waited["all_reduce"] + waited["pipe"]  # within steps; other waits are between steps
    spilled = session.kv.spill.counters.stall_seconds if session.kv.spill else 0.0
    return RankStatistics(
        rank=session.world.rank,
        host=session.world.host,
        replica=session.replica,
        stage=session.place.stage,
        shard=session.place.shard,
        layers=len(grid.stage_layers(session.config.n_layers, session.place)),
        threads=session.threads,
        kernels=kernels.path(),
        weights=_page_statistics(weights.cycle),
        experts=_page_statistics(weights.experts) if weights.experts else {},
        kv=_kv_statistics(session),
        messages=messages,
        memory=msgspec.to_builtins(_planned_memory(session)),
        memory_peak=memory.peak(),
        seconds={
            "compute": session.worker.seconds - inside - weights.stall_seconds - spilled,
            "weights": weights.stall_seconds,
            "kv": spilled,
            **waited,
        },
    )


def _kv_statistics(session: Session) -> dict[str, float]:
    spill = session.kv.spill
    on_disk = {"layers_in_file": spill.layers, **asdict(spill.counters)} if spill else {}
    return {
        "budget": session.spec.memory.kv_bytes,
        "bytes": session.kv.peak,
        "blocks": session.kv.n_blocks,
        **on_disk,
    }


def _planned_memory(session: Session) -> memory.RankMemory:
    """Return the planned maximum of this rank's memory."""
    weights, config, place, limits = session.weights, session.config, session.place, session.limits
    sequences = limits.max_sequences * limits.micro_batches
    kept = session.needs.kept(sequences, config.vocab) if session.world.rank == 0 else memory.KEPT_BY_LEADERS
    capacity = CacheCapacity(limits.n_blocks, limits.blocks_in_memory, limits.n_slots, limits.n_saved)
    step = StepSize(limits.max_sequences, limits.max_tokens)
    needed = capacity.needed(len(limits.windows), session.needs, step, limits.micro_batches)
    rows = memory.step_rows(
        session.needs,
        session.spec,
        config,
        step,
        capacity,
        limits.windows,
        limits.micro_batches,
        limits.streams,
    )
    streams = weights.streamed > 0
    later = memory.taken_later(session.spec, session.source, place, streams)
    pages, network = [page.nbytes for page in weights.pages], session.machines.several_hosts
    return memory.RankMemory(
        weights=min(weights.total, weights.budget),
        adapters=session.adapters.nbytes(place),
        draft=0 if place.rank else draft.nbytes(session.spec, config, session.needs, place.stages),
        kv=cache_in_memory(session.spec, session.caches[place.rank], *needed, capacity.blocks),
        activations=memory.activations(session.activations, place, rows),
        process=memory.process(session.source, config, place, pages, kept, later, streams, network),
    )


def _page_statistics(cache: WeightCache[Page] | ExpertCache[Page]) -> dict[str, float]:
    return {"share": cache.total, "budget": cache.budget, **asdict(cache.counters)}
