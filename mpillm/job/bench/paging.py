"""Runs whose weights do not fit: what they read for a token of each sequence, and how near that is to the disk's rate.

Every function is collective, and returns on rank 0 what it measured, on the others nothing of use.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import msgspec

from ...comm.world import World
from ...engine.scheduler import blocks_for
from ...errors import JobError
from ...kernels import KV_BLOCK
from ...weights.packed_source import PackedSource
from ...weights.paging import PATIENCE
from .. import memory, plan
from ..limits import TOKENS
from ..session import Session
from ..spec import Batch, Memory, Spec, byte_size
from . import disk
from .result import Run
from .runs import Options, Step, prompts_of, run_steps

WARM = PATIENCE + 1  # tokens of each sequence before those that count: how far to read ahead has settled then


def measure(world: World, spec: Spec, model: Path, options: Options) -> Iterator[tuple[Run, tuple[int, int]]]:
    """A run for each budget and number of sequences, and its layout (stages, shards)."""
    for budget in options.budgets:
        for sequences in sorted(set(options.sequences)):
            yield _measure(world, spec, model, budget, sequences, options)


def _measure(
    world: World, spec: Spec, model: Path, budget: str, sequences: int, options: Options
) -> tuple[Run, tuple[int, int]]:
    context = options.contexts[0]
    # Prompts may take several steps, beside the tokens of those whose prompt was in the first: who began then must not
    # end before all that counts is done.
    tokens = WARM + options.repeats + 2 * -(-sequences * context // TOKENS)
    with world.together():
        spec = _bounded(world, spec, budget, sequences, context + tokens)
    world.barrier()
    begun = time.perf_counter()
    with closing(Session(world, spec, model)) as session:
        ready = time.perf_counter() - begun
        prompts = prompts_of(sequences, context, session.config.vocab)
        begun = time.perf_counter()
        run_steps(session, prompts, 1)  # what stays comes into memory
        first = time.perf_counter() - begun
        disks, before = [_disk(session)], _counters(session)
        steps = run_steps(session, prompts, tokens)
        after = _counters(session)
        disks.append(_disk(session))
        weights = world.gather((session.weights.total, session.weights.budget))
        peaks = world.gather(memory.peak())
        layout, mixture = (session.place.stages, session.place.shards), session.weights.experts is not None
        made = Run(what="paging", threads=session.threads, sequences=sequences, tokens=context)
    if not steps:
        return made, layout
    counted = all_decode(steps, sequences, options.repeats)
    made.rate = sum(step.generated for step in counted) / sum(step.seconds for step in counted)
    made.seconds = sequences / made.rate
    loaded, waited = (
        [late[i] - early[i] for early, late in zip(before, after, strict=True)] for i in range(2)
    )
    made.budget = weights[0][1]
    made.streamed = sum(loaded) / len(steps) * len(counted) / options.repeats
    made.waited = max(waited) / sum(step.seconds for step in steps)
    made.ready, made.first_step, made.memory = ready, first, max(peaks)
    if all(disks):
        made.disk = sum(rate or 0.0 for rate in disks) / len(disks)
    if made.disk is not None and not mixture:  # which experts tokens will choose, nobody knows
        must = sum(max(total - budget, 0) for total, budget in weights)
        made.disk_share = must / made.disk / made.seconds
    return made, layout


def all_decode(steps: Sequence[Step], sequences: int, repeats: int) -> list[Step]:
    """Those in which all sequences generate and do nothing else: `repeats` tokens of each, after the warm ones."""
    begin = max(number for number, step in enumerate(steps) if step.prompt) + 1
    generated, found = 0, []
    for step in steps[begin:]:
        if WARM * sequences <= generated < (WARM + repeats) * sequences:
            found.append(step)
        generated += step.generated
    return found


def _bounded(world: World, spec: Spec, budget: str, sequences: int, longest: int) -> Spec:
    """The job with a budget for weights, and a KV cache that holds its sequences."""
    planned = plan.make(spec, world.size)
    longest += KV_BLOCK  # all are admitted at once only if each finds a block to grow into
    blocks = blocks_for(longest) * sequences
    kv = blocks * KV_BLOCK * max(rank.kv_token for rank in planned.ranks)
    if budget.endswith("%"):
        share = sum(rank.weights_share for rank in planned.ranks) // world.size
        weights = int(share * float(budget[:-1]) / 100)
    else:
        weights = byte_size(budget)
    least = max(rank.weights_least for rank in planned.ranks)
    if weights < least:
        raise JobError(
            f"--budget {budget} is {weights} bytes for each rank, but {least} are the least that works."
        )
    room = Memory(weights=weights, kv=kv, max_context=longest)
    return msgspec.structs.replace(spec, memory=room, batch=Batch(max_num_seqs=sequences))


def _counters(session: Session) -> list[tuple[int, float]]:
    """Bytes that each rank has loaded so far, and seconds that it has waited for them."""
    return session.world.gather((session.weights.loaded, session.weights.stall_seconds))


def _disk(session: Session) -> float | None:
    """What the disks of all hosts give together; None if the model is not packed, or one of them cannot say."""
    world, source = session.world, session.source
    if not isinstance(source, PackedSource):
        return None
    rate = None
    if world.hosts.index(world.host) == world.rank:
        rate = disk.rate([file.path for file in source.packed_files])
    rates = [
        found for rank, found in enumerate(world.gather(rate)) if world.hosts.index(world.hosts[rank]) == rank
    ]
    return sum(found or 0.0 for found in rates) if all(rates) else None
