"""The real engine, timed step by step: prefill, decode of one and of many sequences, and start-up.

Every function is collective. Only rank 0 gets the measurements.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import numpy as np

from mpillm.bench.against import Peer, Prompts, ratio
from mpillm.bench.energy import EnergyMeter
from mpillm.bench.profile import Profile
from mpillm.bench.result import Run
from mpillm.comm.world import World
from mpillm.engine.engine import Engine
from mpillm.engine.request import Request
from mpillm.engine.worker import follow
from mpillm.run.session import Session
from mpillm.spec import BatchSection, LayoutSection, MemorySection, OutputSection, Spec
from mpillm.weights.inventory import HEAD

KV = "4TiB"  # the KV cache is as large as `max_context` makes it; the system gives only what is written
START = 16  # tokens of the prompt that a start-up is timed with
TOKENS = 16  # tokens that are decoded between two timings


@dataclass(frozen=True)
class BenchOptions:
    """The settings of the measurements; every value of each list is measured."""

    what: frozenset[str]
    threads: tuple[int, ...] = ()  # the threads of each rank to try; empty: what the machine offers
    sequences: tuple[int, ...] = (1, 8, 32, 128)  # the numbers of sequences that decode together
    prompts: tuple[int, ...] = (512,)  # lengths
    contexts: tuple[int, ...] = (16,)  # tokens before the first decoded one
    budgets: tuple[str, ...] = ()  # budgets for streamed weights: a part of a rank's share, or bytes
    draft: str | None = None  # a model that drafts, where speculation is measured
    repeats: int = 5

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(*self.prompts, *self.contexts, START) + TOKENS


@dataclass(frozen=True)
class TimedStep:
    """One of the engine's steps."""

    prompt: int  # tokens of prompts
    generated: int
    seconds: float
    joules: float | None = None  # energy of the host's processors, if it is known


def spec_for(model: str, threads: int, options: BenchOptions) -> Spec:
    """Return the job of a bench's session: the defaults, with memory for the largest run."""
    return Spec(
        model=model,
        input="-",
        output=OutputSection(path="-"),
        layout=LayoutSection(threads=threads),
        memory=MemorySection(kv=KV, max_context=options.longest),
        batch=BatchSection(max_num_seqs=max(1, *options.sequences), speculation="off"),
    )


def start_up(world: World, spec: Spec, model: Path, options: BenchOptions, peer: Peer | None) -> Run:
    """Measure from opening the model to the first token, with what the page cache holds after a first start."""
    ours, theirs = [], []
    prompt = prompts_of(1, START, 256)
    for turn in range(-1, options.repeats):  # the first one warms up
        world.barrier()
        seconds, threads = _first_token(world, spec, model, prompt)
        gc.collect()  # a session is part of a reference cycle: freeing its memory is no part of the next start
        other = peer.start(prompt[0]) if peer else 0.0
        if turn >= 0:
            ours.append(seconds)
            theirs.append(other)
    made = Run(what="startup", threads=threads, sequences=1, tokens=START, seconds=median(ours))
    if peer:
        made.peer_seconds, made.ratio = median(theirs), ratio(theirs, ours)
    return made


def _first_token(world: World, spec: Spec, model: Path, prompt: Prompts) -> tuple[float, int]:
    """Return seconds from opening the model to the first token, and the threads; nothing holds the session."""
    start = time.perf_counter()
    with closing(Session(world, spec, model)) as session:
        run_steps(session, prompt, 1)
        return time.perf_counter() - start, session.threads


def prefill(session: Session, length: int, options: BenchOptions, peer: Peer | None) -> Run:
    """Return one prompt, to its first token; rate in prompt tokens."""
    made = Run(what="prefill", threads=session.threads, sequences=1, tokens=length)
    made.int8_operations = int8_operations(session, length, 1)
    return _measure(session, made, prompts_of(1, length, session.config.vocab), 1, options, peer)


def decode(session: Session, sequences: int, context: int, options: BenchOptions, peer: Peer | None) -> Run:
    """Steps of `sequences` sequences, which have `context` tokens at first; the rate counts the tokens of all."""
    what = "decode" if sequences == 1 else "batch"
    made = Run(what=what, threads=session.threads, sequences=sequences, tokens=context)
    made.weight_bytes = weight_bytes(session, sequences)
    made.int8_operations = int8_operations(session, sequences, sequences)
    made.kv_bytes = sequences * (context + TOKENS // 2) * session.kv_token_nbytes
    prompts = prompts_of(sequences, context, session.config.vocab)
    return _measure(session, made, prompts, TOKENS, options, peer)


def _measure(
    session: Session, made: Run, prompts: Prompts, tokens: int, options: BenchOptions, peer: Peer | None
) -> Run:
    """Fill in the median rates of runs that alternate with the peer's, and where a step's time goes."""
    ours, theirs, seconds, joules = [], [], [], []
    for turn in range(-1, options.repeats):  # the first one warms up
        step = _typical(run_steps(session, prompts, tokens), made)
        other = _peer_rate(peer.run(prompts, tokens), made) if peer else 1.0
        if turn >= 0 and step is not None:
            ours.append((step.prompt + step.generated) / step.seconds)
            seconds.append(step.seconds)
            theirs.append(other)
            if step.joules is not None:
                joules.append(step.joules / (step.prompt + step.generated))
    sent = _sent(session)
    with Profile() as profile:
        step = _typical(run_steps(session, prompts, tokens, profile), made)
    made.wire_bytes = (_sent(session) - sent) / (len(prompts) * (len(prompts[0]) + tokens - 1))
    if step is None:
        return made
    made.seconds, made.rate = median(seconds), median(ours)
    made.joules = median(joules) if joules else None
    made.kernels = {name: share / step.seconds for name, share in profile.typical(made.what == "prefill")}
    made.overhead = 1 - sum(made.kernels.values())
    if peer:
        made.peer_rate, made.ratio = median(theirs), ratio(ours, theirs)
    return made


def run_steps(
    session: Session,
    prompts: Prompts,
    tokens: int,
    profile: Profile | None = None,
    between: Callable[[TimedStep], None] | None = None,
) -> list[TimedStep]:
    """Run prompts to `tokens` greedy tokens each: rank 0's steps, nothing on the others.

    `between` is called with each step on rank 0, before the next one begins and off the clock.
    """
    if session.world.rank:
        follow(session.worker, session.channel)
        return []
    engine = session.engine()
    requests = (Request(str(i), tuple(prompt), max_tokens=tokens) for i, prompt in enumerate(prompts))
    steps = []
    for step in _steps(engine, engine.run(requests), profile):
        steps.append(step)
        if between is not None:
            between(step)
    engine.stop(0)
    return steps


def _steps(engine: Engine, running: Iterator[object], profile: Profile | None) -> Iterator[TimedStep]:
    totals, meter = engine.totals, EnergyMeter()
    prompt, generated = totals.prompt_tokens, totals.generated_tokens
    before = meter.read()
    start = time.perf_counter()
    for _ in running:
        now = time.perf_counter()
        joules = meter.joules(before, meter.read())
        step = TimedStep(
            totals.prompt_tokens - prompt, totals.generated_tokens - generated, now - start, joules
        )
        prompt, generated = totals.prompt_tokens, totals.generated_tokens
        if profile:
            profile.step(step.prompt > 0)
        yield step
        before = meter.read()
        start = time.perf_counter()


def _typical(steps: list[TimedStep], made: Run) -> TimedStep | None:
    """Return all of a prompt as one step; for decoding, the median of the steps with the most sequences."""
    if not steps:
        return None
    if made.what == "prefill":
        joules = _joules(steps)
        joules = None if joules is None else joules * len(steps)
        return TimedStep(sum(step.prompt for step in steps), 0, sum(step.seconds for step in steps), joules)
    alone = [step for step in steps if not step.prompt]
    maximum = max(step.generated for step in alone)
    full = [step for step in alone if step.generated == maximum]
    return TimedStep(0, maximum, median(step.seconds for step in full), _joules(full))


def _joules(steps: list[TimedStep]) -> float | None:
    """Return the mean of steps: counters move on in jumps of a millisecond."""
    told = [step.joules for step in steps if step.joules is not None]
    return fmean(told) if told else None


def _peer_rate(seconds: list[float], made: Run) -> float:
    """Return tokens a second of the same kind of step."""
    if made.what == "prefill":
        return made.tokens / seconds[0]
    return made.sequences / median(seconds[1:])


def _sent(session: Session) -> int:
    """Return bytes that all ranks have sent so far."""
    mine = sum(int(count["bytes_sent"]) for count in session.counters.as_dict().values())
    return sum(session.world.gather(mine))


def weight_bytes(session: Session, rows: int) -> int:
    """Return bytes of weights that a step of `rows` rows reads on this rank, if experts are chosen at random."""
    picked = 1 - (1 - session.config.expert_share) ** rows
    entries = [entry for item in session.weights.pages for entry in item.entries]
    return round(sum(entry.nbytes * (picked if entry.key.expert >= 0 else 1) for entry in entries))


def int8_operations(session: Session, rows: int, drawn: int) -> int:
    """Multiplications and additions of 8-bit integers on this rank for `rows` rows, of which `drawn` have logits."""
    share = session.config.expert_share
    return round(
        sum(
            2
            * entry.n
            * entry.k
            * (drawn if page.kind == HEAD else rows)
            * (share if page.expert >= 0 else 1)
            for page in session.weights.pages
            for entry in page.entries
            if entry.bounds and entry.type.quantised
        )
    )


def prompts_of(count: int, length: int, vocab: int) -> list[list[int]]:
    """Random tokens: no two prompts share a beginning."""
    random = np.random.default_rng(count * 65_537 + length)
    drawn: list[list[int]] = random.integers(0, vocab, (count, length)).tolist()
    return drawn
