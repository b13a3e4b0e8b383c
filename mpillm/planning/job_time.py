"""The time of a job: the rounds of its prompts and of its answers, and how replicas share its requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from mpillm.planning.rank_plan import RankPlan
from mpillm.planning.speed import Speed
from mpillm.planning.stage_time import Round, Stage, round_of
from mpillm.planning.step_time import LOAD, RankWork, StepRows

# Seconds of rank 0 on a core of speed 1 (see `step_time`): for a line and its answer, and for a token of a prompt.
REQUEST, PROMPT_TOKEN = 150e-6, 2e-6
# Seconds before the first step and in it, on a core of speed 1:
PACK = 0.35e-9  # for each byte of weights that is packed before the first step (2.4 to 3.3 GB/s measured)
IMPORTS = 0.2  # for each rank until it can take part in the layout
READY = 0.12  # for each rank from the layout to its first step, without weights: libraries, tokenizer, engine
FIRST = 3e-3  # for each layer in the first step, which sets up its kernels (30 layers: 85 to 130 ms measured)
PRECISION = 0.005  # the relative precision of the time at which all replicas end


@dataclass(frozen=True)
class Demand:
    """The numbers of tokens that a job asks for, estimated from its lines."""

    requests: int
    prompt: float  # tokens of all prompts
    generated: float  # the maximum of all generated tokens
    scored: float = 0.0  # prompt tokens whose logits are requested
    drafted: float = 0.0  # rows of drafted tokens while answers are generated
    accepted: float = 0.0  # generated tokens that were drafted, and took no step of their own

    @property
    def context(self) -> float:
        """The average number of tokens that a row attends to while answers are generated."""
        return (self.prompt + self.generated / 2) / self.requests if self.requests else 0.0

    def of(self, requests: int) -> Demand:
        """Return the part of the demand that `requests` of the requests make."""
        part = requests / self.requests
        return Demand(requests, *(part * tokens for tokens in astuple(self)[1:]))


@dataclass(frozen=True)
class JobTime:
    """The seconds that a replica takes for its part of a job, by cause, and its rounds."""

    prefill: float
    decode: float
    lines: float  # the work of rank 0 for lines and answers
    loading: float  # loading the weights before the first step
    prompt_tokens: float
    sequences: float  # sequences that run at once
    prompt_round: Round
    decode_round: Round

    @property
    def seconds(self) -> float:
        """The sum of all seconds."""
        return self.prefill + self.decode + self.lines + self.loading

    @property
    def prefill_rate(self) -> float:
        """Tokens/s of prompts while nothing is generated."""
        return self.prompt_tokens / self.prefill if self.prefill else 0.0

    @property
    def decode_rate(self) -> float:
        """Generated tokens/s while no prompts are computed."""
        return self.sequences / self.decode_round.seconds


def job_time(
    stages: Sequence[Stage], demand: Demand, step_tokens: int, sequences: float, loading: float = 0.0
) -> JobTime:
    """Return the time that a replica takes for a demand.

    A step has up to `step_tokens` rows, `sequences` sequences run at once, and loading takes `loading` seconds.
    """
    count = max(min(sequences, demand.requests), 1.0)
    rows = max(min(step_tokens, demand.prompt), 1.0)
    length = demand.prompt / max(demand.requests, 1)
    scored = rows * demand.scored / max(demand.prompt, 1.0)
    prompt_round = round_of(stages, StepRows(rows, rows / max(length, 1.0), length / 2, scored))
    turns = demand.generated - demand.accepted
    drafted = count * demand.drafted / max(turns, 1.0)
    decode_round = round_of(stages, StepRows(count + drafted, count, demand.context, drafted))
    # A sequence begins as soon as another one ends.
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
    """Return seconds until a replica's ranks have loaded weights, touched all memory, and set up their kernels."""
    works = [work for stage in stages for work in stage.works]
    speeds = [speed for stage in stages for speed in stage.speeds]
    # The first step sets up the kernels, one stage after the other, while weights are loaded.
    first = sum(FIRST * stage.works[0].layers / stage.speeds[0].core for stage in stages)
    return max(first, *map(_loading, ranks, works, speeds))


def _loading(rank: RankPlan, work: RankWork, speed: Speed) -> float:
    new = min(work.made, rank.weights_held) + rank.kv_held + rank.activations
    own = rank.weights_share / work.page * LOAD + work.made * PACK
    return rank.weights_share / speed.disk + own / speed.core + new / speed.fill


def shared_time(
    takes: Sequence[Callable[[int], float]], counts: Sequence[int], requests: int
) -> tuple[float, list[int]]:
    """Return the seconds of replicas that share `requests` so that all end together, and each replica's by kind.

    For each kind there are a number of replicas in `counts` and a function in `takes`: a replica of the kind takes
    takes(n) seconds for n requests.
    """
    if len(takes) == 1:
        each = -(-requests // counts[0])
        return takes[0](each), [each]
    tried = [1 << power for power in range(requests.bit_length())] + [requests]
    known = [[take(number) for number in tried] for take in takes]

    def within(seconds: float) -> list[int]:
        """Return the number of requests that a replica of each kind computes in `seconds` seconds."""
        return [int(np.interp(seconds, own, tried) + 1e-6) if seconds >= own[0] else 0 for own in known]

    high = min(own[-1] for own in known)
    low = high / (2 * sum(counts))
    while high > low * (1 + PRECISION):
        middle = math.sqrt(low * high)
        done = sum(count * number for count, number in zip(counts, within(middle), strict=True))
        low, high = (low, middle) if done >= requests else (middle, high)
    made = within(high)
    return max(take(number) for take, number in zip(takes, made, strict=True) if number), made
