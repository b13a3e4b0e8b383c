"""What an input asks for, in numbers, and what rank 0 keeps for it (see `input_memory`, which reads the lines)."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from mpillm.batch.endpoints.prompts import MAX_ANSWER
from mpillm.batch.order import PIECE
from mpillm.kernels import KV_BLOCK
from mpillm.planning.grammar_memory import NO_GRAMMARS, GrammarNeeds

LINE = 64  # bytes of a line and of its answer's place at most; 28 stay (see `batch.lines`)
ORDERED = 96  # of a line while its piece of the input is ordered (see `batch.order`)
NAMED = 32 * 2**20  # bytes of all names at most: of lines that run, and of records that wait
# Of a line, and of all, in what is not sorted yet (two tables of names, 0.6 MiB each) or waits for the journal.
UNSORTED, UNSORTED_LINES = 1 << 15, 5 * 2**19
WRITTEN = 3072  # of an answer that is written to results.h5,
WRITING = 12 * 2**20  # and at most, whatever is written (9 MiB measured)
COPIES = 5  # of an answer on its way to the journal (4.6 measured)


@dataclass(frozen=True)
class InputNeeds:
    """What an input asks for; nothing if there is none that can be read."""

    lines: int = 0
    sequences: int = 0
    prompt_tokens: int = 0  # an estimate, of all sequences
    generated_tokens: int = 0  # at most, of all sequences
    scored_tokens: int = 0  # of the prompts': those of which logits are asked for
    # KV cache blocks that all sequences fill, in one group, without each one's last: an estimate; None if unknown.
    blocks: int | None = 0
    # Tokens of a prompt, and how many prompts have no more of them: all of them, the shortest first; unknown if empty.
    lengths: tuple[tuple[int, int], ...] = ()
    longest_answer: int = sys.maxsize  # steps in which tokens of it are drawn, at most
    names: int = 0
    checking: int = 0
    chat: int = 0
    answer: int = 0  # of the largest
    choice: int = 0
    largest: int = 0  # sequences of a line
    reading: int = 0
    grammars: GrammarNeeds = NO_GRAMMARS
    unread: int = 0  # of the lines: they are errors already
    prompts: int = 0  # tokens of all prompts at most, if `blocks` is known,
    tokens: int = 0  # and of all sequences,
    longest: int = sys.maxsize  # and of one of them
    scores: bool = False  # some line asks for logits of more than the last token of a prompt
    adjusts: bool = True  # some line may have tokens drawn from other logits than the model's
    alike: int = sys.maxsize  # sequences, at most, whose first block is an earlier one's as well

    def outputs(self, sequences: int, tokens: int, drafted: int, micro_batches: int) -> int:
        """Rows with logits that a step can have at most, where a sequence draws one token and up to `drafted` drafts.

        A step has up to `sequences` sequences and `tokens` rows; those that run are divided into so many steps.
        """
        if not self.lines or self.blocks is None or self.scores:
            return tokens
        running = self.at_once(sequences * micro_batches, tokens * micro_batches)
        return min(tokens, min(sequences, -(-running // micro_batches)) * (1 + drafted))

    def rows(self, held: bool, drafted: int) -> int:
        """Tokens that a step can have at most, however large it may be, with up to `drafted` drafts of a sequence.

        `held`: the cache holds all blocks, so that no sequence is computed again with what was generated for it.
        """
        if not self.lines or self.blocks is None:
            return sys.maxsize
        return min(self.tokens, self.prompts + (1 + drafted) * self.sequences) if held else self.tokens

    def blocks_at_once(self, sequences: int, tokens: int) -> int:
        """Blocks in use at most, in one group, where so many sequences run at once and a step has `tokens` rows."""
        assert self.blocks is not None
        return self.blocks + self.at_once(sequences, tokens)

    def at_once(self, sequences: int, tokens: int) -> int:
        """Sequences that have blocks at once, of up to so many that run, where a step has `tokens` rows.

        Each step has a row of each that runs, and what is left is for prompts, the shortest ones at worst, of which
        the last one may go on in the next; they end as soon as they have their tokens. Those that share blocks with
        others need fewer rows, but at least a block less, too.
        """
        most, running, rows, steps = min(self.sequences, sequences), 0, 0, 0
        while running < min(most, tokens) and steps < max(self.longest_answer, 1):
            rows += tokens - running
            running = self._begun(rows) + 1
            steps += 1
        return min(running, most)

    def _begun(self, rows: int) -> int:
        """How many prompts so many rows are enough for, at most."""
        found = 0
        for tokens, count in self.lengths:
            own = min(count, rows // tokens)
            found, rows = found + own, rows - own * tokens
            if own < count:
                return found
        return self.sequences

    def fill(self, blocks: int, groups: int, sequences: int, tokens: int) -> bool:
        """Whether so many blocks are enough even if no sequence has anything in common with another one."""
        return groups * (self.tokens // KV_BLOCK + self.at_once(sequences, tokens)) <= blocks

    def kept(self, sequences: int, vocab: int) -> int:
        """Bytes that rank 0 keeps, if so many sequences run at once, of a model with `vocab` tokens."""
        # Requests that run, and those whose line is not finished.
        at_once = min(self.sequences, sequences + self.largest)
        answers = COPIES * min(self.answer, MAX_ANSWER) + at_once * self.choice
        kept = line_bytes(self.lines) + min(self.names, NAMED) + min(WRITTEN * self.lines, WRITING)
        kept += self.chat + self.reading + self.grammars.kept(at_once, vocab)
        return kept + max(self.checking, answers)


NO_INPUT = InputNeeds()


def line_bytes(lines: int) -> int:
    """Bytes that rank 0 keeps of so many lines, besides their names."""
    return LINE * lines + ORDERED * min(lines, PIECE) + min(UNSORTED * lines, UNSORTED_LINES)
