"""The limits of steps and of the cache, and the totals of what the scheduler and the engine have done."""

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
    blocks_in_memory: int  # of them: when more are in use, layers lie on disk
    max_sequences: int  # in one step
    max_tokens: int  # in one step
    micro_batches: int  # steps in flight at once, at most: one for each stage keeps all of them busy
    prefix_sharing: bool = True  # compute what sequences begin with alike only once
    streams: bool = False  # each step costs some rank a pass over weights that do not stay in memory
    # Of each group of layers with a block table of its own; 0: all tokens are kept.
    windows: tuple[int, ...] = (0,)
    speculation: Mode = "off"
    n_slots: int = 0  # for sequences' states, if the model has any
    n_saved: int = 0  # slots for states after prefixes; they are numbered behind the others
    whole_prompts: bool = False  # a step has all of a prompt or nothing; none is longer than `max_tokens`
    short_length: int = 0  # sequences of more tokens have other keys (LongRoPE); 0: none has

    @property
    def shares(self) -> bool:
        """Whether sequences may share what they begin with alike: what the cache keeps of it can be found again."""
        found = self.n_saved if self.n_slots else self.windows
        return self.prefix_sharing and bool(found) and not self.whole_prompts

    @property
    def n_states(self) -> int:
        """All slots."""
        return self.n_slots + self.n_saved

    @property
    def max_running(self) -> int:
        """The maximum number of sequences that are admitted at once."""
        running = self.max_sequences * self.micro_batches
        return min(running, self.n_slots) if self.n_slots else running

    @property
    def max_length(self) -> int:
        """The maximum length in tokens of a sequence that has the cache to itself."""
        return longest_sequence(self.n_blocks, self.windows)


@dataclass(slots=True)
class Totals:
    """Counts of what an engine has done so far. Every prompt token is counted once, as computed or as shared."""

    steps: int = 0
    prompt_tokens: int = 0  # computed
    shared_tokens: int = 0  # of prompts: not computed, because another sequence had them
    recomputed_tokens: int = 0  # computed before, and again because their blocks had been given away
    generated_tokens: int = 0
    preemptions: int = 0
    turns: int = 0  # of sequences in steps that drew tokens for them, one or several each
    drafted: dict[str, int] = field(default_factory=dict)  # tokens, by drafter
    accepted: dict[str, int] = field(default_factory=dict)  # of those, what would have been drawn
    fetched_rows: int = 0  # draws that the candidates at hand could not decide, so more had to be asked for
    peak_sequences: int = 0
    peak_blocks: int = 0

    @property
    def drafted_tokens(self) -> int:
        """The tokens that all drafters have drafted."""
        return sum(self.drafted.values())

    @property
    def accepted_tokens(self) -> int:
        """The drafted tokens, of all drafters, that were accepted."""
        return sum(self.accepted.values())

    def count_drafts(self, drafts: Seq[Drafted], accepted: int) -> None:
        """Count the drafts of a step, of which the first `accepted` are what was drawn."""
        for at, draft in enumerate(drafts):
            self.drafted[draft.by] = self.drafted.get(draft.by, 0) + 1
            self.accepted[draft.by] = self.accepted.get(draft.by, 0) + (at < accepted)

    def count_generated(self, sequence: Sequence) -> None:
        """Count what a sequence has generated since the last call: never less, wherever a signal interrupts it."""
        generated = sequence.generated
        self.generated_tokens += generated - sequence.counted
        sequence.counted = generated
