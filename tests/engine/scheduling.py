"""A scheduler without an engine: sequences, and what the ranks would see of its steps."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from mpillm.engine.blocks import NO_SLOT
from mpillm.engine.drafter import Drafted
from mpillm.engine.limits import Limits
from mpillm.engine.request import Request
from mpillm.engine.scheduler import Scheduler
from mpillm.engine.sequence import Sequence
from mpillm.engine.speculation import Speculation
from mpillm.kernels import KV_BLOCK
from mpillm.model.cache_layout import blocks_for, first_kept

Chosen = list[tuple[Sequence, int]]


def limits(**changes: Any) -> Limits:
    values = {
        "n_blocks": 100,
        "blocks_in_memory": 100,
        "max_sequences": 8,
        "max_tokens": 64,
        "micro_batches": 1,
    }
    return Limits(**{**values, **changes})


_first = itertools.count(1000)


def sequence(name: str, prompt: int, max_tokens: int, shared: int = 0, **more: Any) -> Sequence:
    """A prompt whose first `shared` tokens are those of all others, and whose next one is nobody else's."""
    ids = [*range(shared), next(_first), *range(prompt)][:prompt]
    return Sequence(Request(name, tuple(ids), max_tokens=max_tokens, **more))


class Ranks:
    """Pretends to compute steps: every block must hold what the sequence believes it does."""

    def __init__(self, made: Iterable[Sequence], drafts: Drafts | None = None, **changes: Any) -> None:
        self.limits = limits(**changes)
        self.drafts = drafts
        self.scheduler = Scheduler(self.limits, iter(made), speculation=drafts)
        self.finished: list[str] = []
        self.computed: dict[str, list[int]] = {}  # positions, in order
        self.fresh = 0  # rows that were computed for the first time, and not shared before
        self.slots: dict[int, Sequence] = {}  # of running sequences' states
        self.states: dict[int, tuple[int, int]] = {}  # by slot: after how many tokens, and a hash of them
        self._held: dict[
            tuple[int, int], Any
        ] = {}  # by block and offset: a group, and all tokens up to there
        self._contents: dict[str, list[int]] = {}
        self._in_flight: list[Chosen] = []

    def run(self) -> Iterator[Chosen]:
        """Yields every step as it is sent."""
        scheduler = self.scheduler
        while scheduler.has_work():
            while len(self._in_flight) < self.limits.micro_batches and (
                chosen := scheduler.next(self.limits.micro_batches)
            ):
                self._compute(chosen)
                self._in_flight.append(chosen)
                yield chosen
            self._finish(self._in_flight.pop(0))
        assert scheduler.blocks_in_use == 0

    def _compute(self, chosen: Chosen) -> None:
        assert sum(count + len(one.drafts) for one, count in chosen) <= self.limits.max_tokens
        assert len(chosen) <= self.limits.max_sequences
        assert len({name_of(one) for one, _ in chosen}) == len(chosen)
        before = dict(self._held)
        written: set[tuple[int, int]] = set()
        self.slots = {slot: one for slot, one in self.slots.items() if one.slot == slot}
        for one, count in chosen:
            end = one.computed + count
            for group, window in enumerate(self.limits.windows):
                table = one.tables[group]
                assert table.first <= first_kept(one.computed, window)
                assert table.end == blocks_for(end + len(one.drafts))
                assert len(table.blocks) == len(set(table.blocks))
                assert set(table.blocks) <= set(range(self.limits.n_blocks))
                for position in range(max(one.computed - window + 1, 0) if window else 0, one.computed):
                    # Of what other sequences have computed, nothing is from this very step.
                    assert before[_place(one, group, position)] == (group, self._content(one, position))
                for position in range(one.computed, end):
                    place = _place(one, group, position)
                    assert place not in written  # by another sequence, or in another group
                    written.add(place)
                    self._held[place] = group, self._content(one, position)
                for position, draft in enumerate(one.drafts, end):
                    place = _place(one, group, position)
                    assert place not in written
                    written.add(place)
                    known = [
                        self._content(one, end - 1),
                        *(before.token for before in one.drafts[: position - end]),
                    ]
                    self._held[place] = group, functools.reduce(_follow, [*known, draft.token])
            if self.limits.n_slots:
                assert self.slots.setdefault(one.slot, one) is one
                assert one.slot in range(self.limits.n_slots)
                if one.loads != NO_SLOT:
                    assert one.loads in range(self.limits.n_slots, self.limits.n_states)
                    self.states[one.slot] = self.states[one.loads]
                if one.computed:
                    assert self.states[one.slot] == (one.computed, self._content(one, one.computed - 1))
            self.computed.setdefault(name_of(one), []).extend(range(one.computed, end))
            self.fresh += max(0, end - max(one.computed, one.reached))
        for one, count in chosen if self.limits.n_slots else ():
            self.states[one.slot] = one.computed + count, self._content(one, one.computed + count - 1)
        for one, _ in chosen:
            if one.saves != NO_SLOT:
                assert one.saves in range(self.limits.n_slots, self.limits.n_states)
                self.states[one.saves] = self.states[one.slot]
        for one, count in chosen:  # what is read was not overwritten by this very step
            for group, window in enumerate(self.limits.windows):
                end = one.computed + count
                for position in range(max(one.computed - window + 1, 0) if window else 0, end):
                    assert self._held[_place(one, group, position)][1] == self._content(one, position)

    def _content(self, one: Sequence, position: int) -> int:
        """A hash of a sequence's tokens up to `position`."""
        known = self._contents.setdefault(name_of(one), [])
        for token in one.tokens[len(known) : position + 1]:
            known.append(_follow(known[-1] if known else 0, token))
        return known[position]

    def _finish(self, chosen: Chosen) -> None:
        for one, count in chosen:
            one.in_flight = False
            one.computed += count
            drafts, one.drafts = one.drafts, []
            one.loads = one.saves = NO_SLOT
            one.reached = max(one.reached, one.computed)
            if one.computed == len(one.tokens):
                if one.request.only_reads:
                    one.finish_reason = "length"
                else:
                    one.append(one.generated)
                    for token, *_ in drafts:
                        if token != one.tokens[-1] or one.finish_reason:
                            break
                        one.computed += 1
                        one.append(one.generated)
                    one.reached = max(one.reached, one.computed)
            self.scheduler.give_back(one)
            if one.finish_reason:
                self.scheduler.release(one)
                self.finished.append(name_of(one))


class Drafts(Speculation):
    """Drafts as many tokens as there is room for, the first few of which will be drawn."""

    def __init__(self, seed: int) -> None:
        super().__init__("prompt-lookup", streams=False, expert_share=1.0)
        self._rng = np.random.default_rng(seed)
        self.drafted = 0

    def draft(self, sequence: Sequence, maximum: int) -> list[Drafted]:
        right = int(self._rng.integers(8))
        tokens = [sequence.generated + i if i < right else -1 for i in range(min(maximum, 15))]
        self.drafted += len(tokens)
        return [Drafted(token) for token in tokens]


def name_of(one: Sequence) -> str:
    return f"{one.request.id}-{one.request.choice}" if one.request.choice else one.request.id


def _follow(before: int, token: int) -> int:
    return hash((before, token))


def _place(one: Sequence, group: int, position: int) -> tuple[int, int]:
    table = one.tables[group]
    assert position // KV_BLOCK >= table.first
    return table.blocks[position // KV_BLOCK - table.first], position % KV_BLOCK


def steps_of(ranks: Ranks) -> list[list[tuple[str, int]]]:
    return [[(one.request.id, count) for one, count in chosen] for chosen in ranks.run()]


def various(count: int, seed: int) -> list[Sequence]:
    """Sequences of all kinds and of up to 250 tokens, some of which begin alike."""
    rng = np.random.default_rng(seed)
    kinds: list[dict[str, Any]] = [{}, {"prompt_logprobs": 0}, {"kind": "embed"}]
    return [
        sequence(
            str(i),
            int(rng.integers(1, 130)),
            int(rng.integers(0, 120)),
            shared=int(rng.choice([0, 40, 96])),
            **kinds[int(rng.integers(3))],
        )
        for i in range(count)
    ]


def questions(count: int, seed: int, longest: int) -> list[Sequence]:
    """Prompts with one to five choices each, which are scored behind what they have in common."""
    rng, made = np.random.default_rng(seed), []
    for number in range(count):
        prompt = [number, *range(int(rng.integers(1, 150)))]
        choices = int(rng.integers(1, 6))
        for choice in range(choices):
            own = [1000 + choice, *range(int(rng.integers(longest)))]
            scored = {"prompt_logprobs": 0, "score_from": len(prompt), "followed": choice + 1 < choices}
            request = Request(str(number), (*prompt, *own), choice=choice, max_tokens=0, **scored)
            made.append(Sequence(request))
    return made
