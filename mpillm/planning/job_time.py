"""What a job takes: the rounds of its prompts and of its answers, and how replicas share its requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from mpillm.planning.rank_plan import RankPlan
from mpillm.planning.speed import Speed
from mpillm.planning.step_time import LOAD, RankWork, Round, Stage, StepRows, round_of

# Seconds of rank 0, as the constants of `step_time`: for a line and its answer, and for a token of a prompt.
REQUEST, PROMPT_TOKEN = 150e-6, 2e-6
# Seconds before a job's steps, and in the first one:
PACK = 0.35e-9  # of a byte of weights that one core makes ready before the first step: 2.4 to 3.3 GB/s
IMPORTS = 0.2  # of every rank until it can take part in the layout: those of other hosts may be late
READY = 0.12  # of every rank from the layout to its first step, weights aside: libraries, tokenizer, engine
FIRST = 3e-3  # of a layer in the first step, in which its kernels are made: 85 to 130 ms of 30 layers
PRECISION = 0.005  # of the time in which replicas share a job


@dataclass(frozen=True)
class Demand:
    """What a job asks for: estimates of its tokens, from its lines."""

    requests: int
    prompt: float  # tokens, all together
    generated: float  # at most
    scored: float = 0.0  # of the prompt's: those of which logits are asked for
    drafted: float = 0.0  # rows of guessed tokens, while answers are generated
    accepted: float = 0.0  # of the generated tokens: those that were guessed, and took no step of their own

    @property
    def context(self) -> float:
        """Tokens that a row attends to on average while answers are generated."""
        return (self.prompt + self.generated / 2) / self.requests if self.requests else 0.0

    def of(self, requests: int) -> Demand:
        """The part of so many of the requests."""
        part = requests / self.requests
        return Demand(requests, *(part * tokens for tokens in astuple(self)[1:]))


@dataclass(frozen=True)
class JobTime:
    """Seconds of a replica for its part of a job, and its rounds."""

    prefill: float
    decode: float
    lines: float  # what rank 0 does for each of them
    loading: float  # the weights, before the first step
    prompt_tokens: float
    sequences: float  # that run at once
    prompt_round: Round
    decode_round: Round

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.prefill + self.decode + self.lines + self.loading

    @property
    def prefill_rate(self) -> float:
        """Tokens/s of prompts, while nothing is generated."""
        return self.prompt_tokens / self.prefill if self.prefill else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens/s that are generated, while no prompts are computed."""
        return self.sequences / self.decode_round.seconds


def job_time(
    stages: Sequence[Stage], demand: Demand, step_tokens: int, sequences: float, loading: float = 0.0
) -> JobTime:
    """A replica's time for a demand; a step has up to `step_tokens` rows, and `sequences` sequences run at once.

    `loading`: seconds before the first step.
    """
    count = max(min(sequences, demand.requests), 1.0)
    rows = max(min(step_tokens, demand.prompt), 1.0)
    length = demand.prompt / max(demand.requests, 1)
    scored = rows * demand.scored / max(demand.prompt, 1.0)
    prompt_round = round_of(stages, StepRows(rows, rows / max(length, 1.0), length / 2, scored))
    turns = demand.generated - demand.accepted
    drafted = count * demand.drafted / max(turns, 1.0)
    decode_round = round_of(stages, StepRows(count + drafted, count, demand.context, drafted))
    # Where one sequence ends the next begins.
    rounds = max(demand.requests / count, 1.0) * turns / max(demand.requests, 1)
    return JobTime(
        prefill=demand.prompt / rows * prompt_round.seconds,
        decode=rounds * decode_round.seconds,
        lines=(REQUEST * demand.requests + PROMPT_TOKEN * demand.prompt) / stages[0].speeds[0].core,
        loading=loading,
        prompt_tokens=demand.prompt,
        sequences=count,
        prompt_round=prompt_round,
        decode_round=decode_round,
    )


def loading_time(stages: Sequence[Stage], ranks: Sequence[RankPlan]) -> float:
    """Seconds until a replica's ranks have their weights, have written all memory once, and have made their kernels."""
    works = [work for stage in stages for work in stage.works]
    speeds = [speed for stage in stages for speed in stage.speeds]
    # The first step makes the kernels, one stage after the other, while weights are loaded.
    first = sum(FIRST * stage.works[0].layers / stage.speeds[0].core for stage in stages)
    return max(first, *map(_loading, ranks, works, speeds))


def _loading(rank: RankPlan, work: RankWork, speed: Speed) -> float:
    new = min(work.made, rank.weights_held) + rank.kv_held + rank.activations
    own = rank.weights_share / work.page * LOAD + work.made * PACK
    return rank.weights_share / speed.disk + own / speed.core + new / speed.fill


def shared_time(
    takes: Sequence[Callable[[int], float]], counts: Sequence[int], requests: int
) -> tuple[float, list[int]]:
    """Seconds of replicas that share `requests` so that they end together, and how many each of a kind computes.

    There are `counts` replicas of each kind, one of which takes `takes(n)` seconds for n requests.
    """
    if len(takes) == 1:
        each = -(-requests // counts[0])
        return takes[0](each), [each]
    tried = [1 << power for power in range(requests.bit_length())] + [requests]
    known = [[take(number) for number in tried] for take in takes]

    def within(seconds: float) -> list[int]:
        """How many requests one of each kind computes in so many seconds."""
        return [int(np.interp(seconds, own, tried) + 1e-6) if seconds >= own[0] else 0 for own in known]

    high = min(own[-1] for own in known)
    low = high / (2 * sum(counts))
    while high > low * (1 + PRECISION):
        middle = math.sqrt(low * high)
        done = sum(count * number for count, number in zip(counts, within(middle), strict=True))
        low, high = (low, middle) if done >= requests else (middle, high)
    made = within(high)
    return max(take(number) for take, number in zip(takes, made, strict=True) if number), made
