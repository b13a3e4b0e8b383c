"""What an input asks for, in numbers, and what rank 0 keeps for it (see `input_memory`, which reads the lines)."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from mpillm.batch.endpoints.prompts import MAX_ANSWER
from mpillm.batch.order import PIECE
from mpillm.kernels import KV_BLOCK
from mpillm.planning.grammar_memory import NO_GRAMMARS, GrammarNeeds

LINE = 64  # maximum bytes for a line and the place of its answer; 28 are kept (see `batch.lines`)
ORDERED = 96  # for each line while its piece of the input is ordered (see `batch.order`)
NAMED = 32 * 2**20  # maximum bytes of all names: of running lines and of waiting records
# Per line, and in all, for what is not sorted yet (two tables of names, 0.6 MiB each) or waits for the journal.
UNSORTED, UNSORTED_LINES = 1 << 15, 5 * 2**19
WRITTEN = 3072  # for each answer while results.h5 is written,
WRITING = 12 * 2**20  # and at most for all (9 MiB measured)
COPIES = 5  # of an answer on its way to the journal (4.6 measured)


@dataclass(frozen=True)
class InputNeeds:
    """What an input asks for; nothing without a readable input."""

    lines: int = 0
    sequences: int = 0
    prompt_tokens: int = 0  # an estimate, of all sequences
    generated_tokens: int = 0  # at most, of all sequences
    scored_tokens: int = 0  # of the prompts' tokens those whose logits are requested
    # An estimate of the KV cache blocks that all sequences fill in one group, without the last of each; None: unknown.
    blocks: int | None = 0
    # Tokens of a prompt, and how many prompts have no more of them: all of them, the shortest first; unknown if empty.
    lengths: tuple[tuple[int, int], ...] = ()
    longest_answer: int = sys.maxsize  # maximum number of steps that draw tokens of it
    names: int = 0
    checking: int = 0
    chat: int = 0
    answer: int = 0  # of the largest
    choice: int = 0
    largest: int = 0  # maximum number of sequences of a line
    reading: int = 0
    grammars: GrammarNeeds = NO_GRAMMARS
    unread: int = 0  # lines that cannot be read, which get an error
    prompts: int = 0  # tokens of all prompts at most, if `blocks` is known,
    tokens: int = 0  # and of all sequences,
    longest: int = sys.maxsize  # and of one of them
    scores: bool = False  # some line asks for logits of more than the last token of a prompt
    adjusts: bool = True  # some line may change the logits before a token is drawn
    alike: int = sys.maxsize  # maximum number of sequences that share their first block with an earlier one

    def outputs(self, sequences: int, tokens: int, drafted: int, micro_batches: int) -> int:
        """The maximum rows with logits of a step; a sequence has one token and up to `drafted` drafts in it.

        A step has up to `sequences` sequences and `tokens` rows; running sequences are divided into `micro_batches`
        steps.
        """
        if not self.lines or self.blocks is None or self.scores:
            return tokens
        running = self.at_once(sequences * micro_batches, tokens * micro_batches)
        return min(tokens, min(sequences, -(-running // micro_batches)) * (1 + drafted))

    def rows(self, held: bool, drafted: int) -> int:
        """The maximum number of rows of a step without a limit of its size; a sequence has up to `drafted` drafts.

        `held`: the cache has space for all blocks, so no sequence is computed again together with its generated tokens.
        """
        if not self.lines or self.blocks is None:
            return sys.maxsize
        return min(self.tokens, self.prompts + (1 + drafted) * self.sequences) if held else self.tokens

    def blocks_at_once(self, sequences: int, tokens: int) -> int:
        """The maximum number of used blocks in one group if `sequences` run at once and a step has `tokens` rows."""
        assert self.blocks is not None
        return self.blocks + self.at_once(sequences, tokens)

    def at_once(self, sequences: int, tokens: int) -> int:
        """The maximum number of sequences that have blocks, if up to `sequences` run and a step has `tokens` rows.

        Each step has a row for each running sequence. The other rows are for prompts, in the worst case the shortest
        ones; the last of them may continue in the next step. A sequence ends when it has its tokens. Sequences that
        share blocks with others need fewer rows, but also at least one block less.
        """
        most, running, rows, steps = min(self.sequences, sequences), 0, 0, 0
        while running < min(most, tokens) and steps < max(self.longest_answer, 1):
            rows += tokens - running
            running = self._begun(rows) + 1
            steps += 1
        return min(running, most)

    def _begun(self, rows: int) -> int:
        """The maximum number of prompts for which so many rows are enough."""
        found = 0
        for tokens, count in self.lengths:
            own = min(count, rows // tokens)
            found, rows = found + own, rows - own * tokens
            if own < count:
                return found
        return self.sequences

    def fill(self, blocks: int, groups: int, sequences: int, tokens: int) -> bool:
        """Whether so many blocks are enough even if no two sequences share any."""
        return groups * (self.tokens // KV_BLOCK + self.at_once(sequences, tokens)) <= blocks

    def kept(self, sequences: int, vocab: int) -> int:
        """Bytes that rank 0 keeps if so many sequences run at once; the model has `vocab` tokens."""
        # Running requests, and finished ones of a line that is not finished.
        at_once = min(self.sequences, sequences + self.largest)
        answers = COPIES * min(self.answer, MAX_ANSWER) + at_once * self.choice
        kept = line_bytes(self.lines) + min(self.names, NAMED) + min(WRITTEN * self.lines, WRITING)
        kept += self.chat + self.reading + self.grammars.kept(at_once, vocab)
        return kept + max(self.checking, answers)


NO_INPUT = InputNeeds()


def line_bytes(lines: int) -> int:
    """Bytes that rank 0 keeps of so many lines, besides their names."""
    return LINE * lines + ORDERED * min(lines, PIECE) + min(UNSORTED * lines, UNSORTED_LINES)
