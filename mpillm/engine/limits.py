"""The limits of steps and of the cache, and the counters of the scheduler and the engine."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from mpillm.engine.drafter import Drafted
from mpillm.engine.sequence import Sequence
from mpillm.engine.speculation import Mode
from mpillm.model.cache_layout import longest_sequence


@dataclass(frozen=True, slots=True)
class Limits:
    """The capacity of a step and of the cache."""

    n_blocks: int  # KV blocks of `KV_BLOCK` tokens, the same number on every rank
    blocks_in_memory: int  # if more blocks are in use, layers of the cache are spilled to disk
    max_sequences: int  # sequences in one step
    max_tokens: int  # tokens in one step
    micro_batches: int  # steps in flight at once, at most; one for each stage keeps all stages busy
    prefix_sharing: bool = True  # sequences with a common prefix compute it once
    streams: bool = False  # some rank streams weights in each step
    # The window of each group of layers with its own block table; 0: all tokens are kept.
    windows: tuple[int, ...] = (0,)
    speculation: Mode = "off"
    n_slots: int = 0  # slots for the states of sequences; 0 if the model has no states
    n_saved: int = 0  # slots for saved states of prefixes; their numbers follow those of the other slots
    whole_prompts: bool = False  # a prompt is computed in one step; none is longer than `max_tokens`
    short_length: int = 0  # longer sequences use LongRoPE's long factors; 0: the model has no LongRoPE

    @property
    def shares(self) -> bool:
        """Whether sequences share common prefixes: it is allowed, and the cache can find a prefix again."""
        found = self.n_saved if self.n_slots else self.windows
        return self.prefix_sharing and bool(found) and not self.whole_prompts

    @property
    def n_states(self) -> int:
        """The number of all slots."""
        return self.n_slots + self.n_saved

    @property
    def max_running(self) -> int:
        """The maximum number of sequences that are admitted at once."""
        running = self.max_sequences * self.micro_batches
        return min(running, self.n_slots) if self.n_slots else running

    @property
    def max_length(self) -> int:
        """The maximum length in tokens of a sequence that uses the cache alone."""
        return longest_sequence(self.n_blocks, self.windows)


@dataclass(slots=True)
class Totals:
    """Counters of an engine. Every prompt token is counted once, as computed or as shared."""

    steps: int = 0
    rows: int = 0  # of all steps
    prompt_tokens: int = 0  # computed prompt tokens
    shared_tokens: int = 0  # prompt tokens that were in the cache already, computed for another sequence
    recomputed_tokens: int = 0  # tokens computed again after a preemption
    generated_tokens: int = 0
    preemptions: int = 0
    turns: int = 0  # pairs of a step and a sequence for which it drew at least one token
    drafted: dict[str, int] = field(default_factory=dict)  # drafted tokens, by drafter
    accepted: dict[str, int] = field(default_factory=dict)  # accepted tokens, by drafter
    fetched_rows: int = 0  # draws for which more candidates had to be fetched
    peak_sequences: int = 0
    peak_blocks: int = 0

    @property
    def drafted_tokens(self) -> int:
        """The number of drafted tokens."""
        return sum(self.drafted.values())

    @property
    def accepted_tokens(self) -> int:
        """The number of accepted tokens."""
        return sum(self.accepted.values())

    def count_drafts(self, drafts: Seq[Drafted], accepted: int) -> None:
        """Count the drafts of a step, of which the first `accepted` were accepted."""
        for at, draft in enumerate(drafts):
            self.drafted[draft.by] = self.drafted.get(draft.by, 0) + 1
            self.accepted[draft.by] = self.accepted.get(draft.by, 0) + (at < accepted)

    def count_generated(self, sequence: Sequence) -> None:
        """Count a sequence's tokens since the last call; a signal may interrupt it anywhere without a wrong count."""
        generated = sequence.generated
        self.generated_tokens += generated - sequence.counted
        sequence.counted = generated
