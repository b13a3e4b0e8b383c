"""A sequence's turn in a step: its outputs, and the tokens drawn from them."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from mpillm.engine.drafter import common
from mpillm.engine.sampler import Candidates, draw
from mpillm.engine.sequence import Sequence
from mpillm.engine.step import NO_TARGET, Chunk, Step


class Turn:
    """`count` tokens of a sequence, and the drafts that follow them.

    `rows` has the outputs from which a token may be drawn: those of the last token and of each draft. A row's last
    output is sampled; if it has two, the first one has the model's logits, for log-probabilities.
    """

    def __init__(
        self, sequence: Sequence, count: int, chunk: Chunk, outputs: Seq[Seq[int]], step: Step
    ) -> None:
        """`outputs` has the outputs of each of its chunks, as indices into the step's; the first chunk is `chunk`."""
        self.sequence, self.count, self.chunk = sequence, count, chunk
        self.known = len(sequence.tokens)  # the number of tokens before the step
        self._scored = [i for i in outputs[0] if step.outputs[i].target != NO_TARGET]
        self.rows = [outputs[0][len(self._scored) :], *outputs[1:]]

    @property
    def accepted(self) -> int:
        """The number of drafts that equal the drawn or determined tokens."""
        drafts = self.sequence.drafts
        return common(self.sequence.tokens[self.known :], [draft.token for draft in drafts]) if drafts else 0

    @property
    def row(self) -> Seq[int]:
        """The row from which the next token is drawn; empty if there is none, or a draft before it was wrong."""
        sequence = self.sequence
        at = len(sequence.tokens) - self.known
        if sequence.finish_reason is not None or not sequence.finite or at >= len(self.rows):
            return ()
        return self.rows[at] if self.accepted == at else ()

    def take_scores(self, candidates: Seq[Candidates]) -> None:
        """Store the log-probabilities of the prompt's tokens, unless the model's output is not finite."""
        sequence, request = self.sequence, self.sequence.request
        sequence.finite = all(candidates[i].finite for i in (*self._scored, *self.rows[0]))
        for found in (candidates[i] for i in self._scored if sequence.finite):
            sequence.prompt_logprobs.append(found.target_logit - found.log_z)
            sequence.prompt_top.append(found.top(request.prompt_logprobs or 0))

    def draw(self, row: Seq[int], candidates: Seq[Candidates]) -> bool:
        """Draw the next token from a row, unless it is not finite; return False if more candidates are needed."""
        sequence, request = self.sequence, self.sequence.request
        sequence.finite = all(candidates[i].finite for i in row)
        if not sequence.finite:
            return True
        found = candidates[row[-1]]
        index = draw(found, request, sequence.uniform() if request.temperature > 0 else 0.0)
        if index is None:
            return False
        sequence.append(int(found.ids[index]))
        sequence.append_forced()
        if request.logprobs is not None:
            sequence.logprobs.append(found.logprob(index))
            sequence.top.append(candidates[row[0]].top(request.logprobs))
        return True
