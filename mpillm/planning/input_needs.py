"""The numbers of what an input asks for, and the memory that rank 0 keeps for it. `input_memory` reads the lines."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from mpillm.batch.endpoints.prompts import MAX_ANSWER
from mpillm.batch.order import PIECE
from mpillm.kernels import KV_BLOCK
from mpillm.planning.grammar_memory import NO_GRAMMARS, GrammarNeeds

LINE = 64  # maximum bytes for a line and the place of its answer; 28 are kept (see `batch.lines`)
ORDERED = 96  # bytes of each line while its piece of the input is ordered (see `batch.order`)
NAMED = 32 * 2**20  # maximum bytes of all names: those of running lines and of waiting records
# Bytes of each line, and the maximum of all lines, that are not sorted yet (two tables of names, 0.6 MiB each) or wait
# for the journal.
UNSORTED, UNSORTED_LINES = 1 << 15, 5 * 2**19
# Bytes of each answer while results.h5 is written, and the maximum of all answers (9 MiB measured).
WRITTEN, WRITING = 3072, 12 * 2**20
EXACT = 1e-6  # the rounding error allowed in parts of the lines
COPIES = 5  # copies of an answer on its way to the journal (4.6 measured)


@dataclass(frozen=True)
class InputNeeds:
    """The requirements of an input. All numbers are 0 without a readable input.

    The maxima `prompts`, `tokens` and `longest` are right only if `blocks` is known.
    """

    lines: int = 0
    sequences: int = 0
    prompt_tokens: int = 0  # an estimate of all sequences' prompt tokens
    generated_tokens: int = 0  # the maximum of all sequences' generated tokens
    scored_tokens: int = 0  # the prompt tokens whose logits are requested
    # An estimate of the KV cache blocks that all sequences fill in one group, without the last block of each; None:
    # unknown.
    blocks: int | None = 0
    # The most blocks first: a number of blocks, and how many lines fill that many of them.
    blocks_of_lines: tuple[tuple[int, int], ...] = ()
    # The shortest length first: a number of tokens, and how many prompts have at least that many. Each prompt counts
    # once. Empty: unknown.
    lengths: tuple[tuple[int, int], ...] = ()
    longest_answer: int = sys.maxsize  # the maximum number of steps that draw tokens of one answer
    names: int = 0  # bytes of the lines' names
    checking: int = 0  # maximum bytes for checking a line
    chat: int = 0  # maximum bytes for applying the chat template
    answer: int = 0  # maximum bytes of an answer
    choice: int = 0  # maximum bytes that are kept of a choice
    largest: int = 0  # the maximum number of sequences of a line
    reading: int = 0  # bytes for reading and writing Parquet
    grammars: GrammarNeeds = NO_GRAMMARS
    unread: int = 0  # lines that cannot be read; each gets an error
    prompts: int = 0  # the maximum of all prompts' tokens
    tokens: int = 0  # the maximum of all sequences' tokens
    longest: int = sys.maxsize  # the maximum of one sequence's tokens
    scores: bool = False  # some line asks for logits of more than the last token of a prompt
    adjusts: bool = True  # some line may change the logits before a token is drawn
    alike: int = sys.maxsize  # the maximum number of sequences whose first block is that of an earlier one

    def outputs(self, sequences: int, tokens: int, drafted: int, micro_batches: int) -> int:
        """Return the maximum number of rows of a step that have logits.

        A step has up to `sequences` sequences and `tokens` rows; each sequence has one token and up to `drafted` drafts
        in it. Running sequences are divided into `micro_batches` steps.
        """
        if not self.lines or self.blocks is None or self.scores:
            return tokens
        running = self.at_once(sequences * micro_batches, tokens * micro_batches)
        return min(tokens, min(sequences, -(-running // micro_batches)) * (1 + drafted))

    def rows(self, held: bool, drafted: int) -> int:
        """Return the maximum number of rows of a step of unlimited size; a sequence has up to `drafted` drafts.

        `held`: the cache has space for all blocks, so no sequence loses its blocks and is computed again.
        """
        if not self.lines or self.blocks is None:
            return sys.maxsize
        return min(self.tokens, self.prompts + (1 + drafted) * self.sequences) if held else self.tokens

    def blocks_at_once(self, sequences: int, tokens: int, part: float = 1.0) -> int:
        """Return the maximum number of used blocks in one group if `sequences` run and a step has `tokens` rows.

        For a part of the lines: those that fill most blocks.
        """
        assert self.blocks is not None
        return self._filled(part) + min(self.at_once(sequences, tokens), self.sequences_of(part))

    def sequences_of(self, part: float) -> int:
        """Return the maximum number of sequences of a part of the lines."""
        return self.sequences if part >= 1 else min(self._lines_of(part) * self.largest, self.sequences)

    def _lines_of(self, part: float) -> int:
        return math.ceil(part * self.lines - EXACT)

    def _filled(self, part: float) -> int:
        """Return the blocks of a part of the lines."""
        assert self.blocks is not None
        if part >= 1:
            return self.blocks
        found, lines = 0, self._lines_of(part)
        for blocks, count in self.blocks_of_lines:
            found += blocks * min(count, lines)
            lines -= min(count, lines)
        return found

    def at_once(self, sequences: int, tokens: int) -> int:
        """Return the maximum number of sequences with blocks, if up to `sequences` run and a step has `tokens` rows.

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
        """Return the maximum number of prompts that `rows` rows are enough for."""
        found = 0
        for tokens, count in self.lengths:
            own = min(count, rows // tokens)
            found, rows = found + own, rows - own * tokens
            if own < count:
                return found
        return self.sequences

    def fill(self, blocks: int, groups: int, sequences: int, tokens: int) -> bool:
        """Return whether `blocks` blocks are enough even if no two sequences share a block."""
        return groups * (self.tokens // KV_BLOCK + self.at_once(sequences, tokens)) <= blocks

    def kept(self, sequences: int, vocab: int) -> int:
        """Return bytes that rank 0 keeps if `sequences` sequences run at once, with a vocabulary of `vocab` tokens."""
        # The running sequences, and finished ones of a line whose other sequences run.
        at_once = min(self.sequences, sequences + self.largest)
        answers = COPIES * min(self.answer, MAX_ANSWER) + at_once * self.choice
        kept = line_bytes(self.lines) + min(self.names, NAMED) + min(WRITTEN * self.lines, WRITING)
        kept += self.chat + self.reading + self.grammars.kept(at_once, vocab)
        return kept + max(self.checking, answers)


NO_INPUT = InputNeeds()


def line_bytes(lines: int) -> int:
    """Return bytes that rank 0 keeps of `lines` lines, besides their names."""
    return LINE * lines + ORDERED * min(lines, PIECE) + min(UNSORTED * lines, UNSORTED_LINES)
