"""Times runs whose weights do not fit in memory: the bytes that they read per token, as a share of the disk's rate.

Every function is collective. Only rank 0 gets the measurements.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import msgspec

from mpillm.bench import disk
from mpillm.bench.result import Run
from mpillm.bench.runs import BenchOptions, TimedStep, prompts_of, run_steps
from mpillm.comm.world import World
from mpillm.errors import JobError
from mpillm.kernels import KV_BLOCK
from mpillm.model.cache_layout import blocks_for
from mpillm.planning import memory, plan
from mpillm.planning.limits import TOKENS
from mpillm.run.session import Session
from mpillm.spec import BatchSection, MemorySection, Spec, byte_size
from mpillm.weights.paging.weights import PATIENCE

# Tokens of each sequence that do not count: until then the cache adjusts how far it reads ahead.
WARM = PATIENCE + 1
# The rate of a disk changes from one second to the next, so the disk is measured again before each TURN tokens. The
# first token of a turn does not count, because some of its weights were read during that measurement.
TURN = 3


def measure(
    world: World, spec: Spec, model: Path, options: BenchOptions
) -> Iterator[tuple[Run, tuple[int, int]]]:
    """Yield a run for each budget and number of sequences, and its layout (stages, shards)."""
    for budget in options.budgets or ("25%",):
        for sequences in sorted(set(options.sequences)):
            yield _measure(world, spec, model, budget, sequences, options)


def _measure(
    world: World, spec: Spec, model: Path, budget: str, sequences: int, options: BenchOptions
) -> tuple[Run, tuple[int, int]]:
    context = options.contexts[0]
    # Prompts may take several steps, in which the first sequences already decode. These need enough tokens to run until
    # all that counts has been measured.
    tokens = (
        WARM + options.repeats + -(-options.repeats // (TURN - 1)) + 2 * -(-sequences * context // TOKENS)
    )
    with world.together():
        spec = with_budget(world, spec, budget, sequences, context + tokens)
    world.barrier()
    start = time.perf_counter()
    with closing(Session(world, spec, model)) as session:
        ready = time.perf_counter() - start
        prompts = prompts_of(sequences, context, session.config.vocab)
        start = time.perf_counter()
        run_steps(session, prompts, 1)  # loads the pages that stay in memory
        first = time.perf_counter() - start
        before = _counters(session)
        with closing(_Disks(session)) as disks:
            disks.measure()
            pace = _Pace(sequences)

            def between(step: TimedStep) -> None:
                pace.add(step)
                if pace.turn:
                    disks.measure()

            steps = run_steps(session, prompts, tokens, between=between)
            after = _counters(session)
            disks.measure()
            rate = disks.rate()
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
    made.disk = rate
    if made.disk is not None:  # a mixture must read what its tokens choose
        must = made.streamed if mixture else sum(max(total - budget, 0) for total, budget in weights)
        made.disk_share = must / made.disk / made.seconds
    return made, layout


class _Pace:
    """Counts the tokens of each sequence since all sequences generate and none computes its prompt."""

    def __init__(self, sequences: int) -> None:
        self._sequences, self._generated = sequences, 0

    def add(self, step: TimedStep) -> None:
        """Count a step; a step with prompts resets the count."""
        self._generated = 0 if step.prompt else self._generated + step.generated

    @property
    def turn(self) -> bool:
        """Whether a turn begins now."""
        token, others = divmod(self._generated, self._sequences)
        return not others and token >= WARM and (token - WARM) % TURN == 0

    @property
    def number(self) -> int:
        """The number of the next token among those that count; -1 if it does not count."""
        turn, place = divmod(self._generated // self._sequences - WARM, TURN)
        return turn * (TURN - 1) + place - 1 if turn >= 0 and place else -1


def all_decode(steps: Sequence[TimedStep], sequences: int, repeats: int) -> list[TimedStep]:
    """Return the steps in which all sequences generate and none computes its prompt: `repeats` tokens of each.

    The steps of the warm-up and the first one of each turn are left out.
    """
    pace, found = _Pace(sequences), list[TimedStep]()
    for step in steps:
        if step.prompt:
            found.clear()
        elif 0 <= pace.number < repeats:
            found.append(step)
        pace.add(step)
    return found


def with_budget(world: World, spec: Spec, budget: str, sequences: int, longest: int) -> Spec:
    """Return the job with a budget for weights, and a KV cache that holds its sequences."""
    planned = plan.make(spec, world.size)
    longest += KV_BLOCK  # the scheduler admits a sequence if there is a block for it to grow into
    blocks = blocks_for(longest) * sequences
    kv = blocks * KV_BLOCK * max(rank.kv_token for rank in planned.ranks)
    if budget.endswith("%"):
        share = sum(rank.weights_share for rank in planned.ranks) // world.size
        weights = int(share * float(budget[:-1]) / 100)
    else:
        weights = byte_size(budget)
    minimum = max(rank.weights_minimum for rank in planned.ranks)
    if weights < minimum:
        raise JobError(
            f"--budget {budget} is {weights} bytes for each rank, but the minimum is {minimum} bytes."
        )
    memory = MemorySection(weights=weights, kv=kv, max_context=longest)
    return msgspec.structs.replace(
        spec, memory=memory, batch=BatchSection(max_num_seqs=sequences, speculation="off")
    )


def _counters(session: Session) -> list[tuple[int, float]]:
    """Return bytes that each rank has loaded so far, and seconds that it has waited for them."""
    return session.world.gather((session.weights.loaded, session.weights.stall_seconds))


class _Disks:
    """The disks of all hosts: the first rank on each measures its own."""

    def __init__(self, session: Session) -> None:
        self._world, source = session.world, session.source
        self._own: disk.DiskReader | None = None
        if source.files_read_as_stored and self._first(self._world.rank):
            self._own = disk.DiskReader(list(source.files_read_as_stored))

    def measure(self) -> None:
        """Note what this rank's disk gives now."""
        if self._own:
            self._own.measure()

    def rate(self) -> float | None:
        """Return the mean rates of all together (collective); None if the model is not packed, or a disk cannot say."""
        everyone = self._world.gather(self._own.rates if self._own else [])
        hosts = [rates for rank, rates in enumerate(everyone) if self._first(rank)]
        return sum(sum(rates) / len(rates) for rates in hosts) if all(hosts) else None

    def close(self) -> None:
        if self._own:
            self._own.close()

    def _first(self, rank: int) -> bool:
        """Return whether this rank is the first one on its host."""
        hosts = self._world.hosts
        return hosts.index(hosts[rank]) == rank
