"""The operations on the embeddings of tokens before the first layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mpillm.model.batch import Batch, Ints
from mpillm.model.layers.norm import NormSpec
from mpillm.model.layers.rank import Floats, Rank
from mpillm.weights.inventory import TensorSpec
from mpillm.weights.page import Page
from mpillm.weights.roles import Key


@dataclass(frozen=True)
class EntrySpec:
    """Learned vectors are added, of `positions` positions and of `segments` segments; the `norm` is of the sum.

    With a `padding` token, as RoBERTa has it, that token has position `padding`, and the others are counted from there.
    The first `skipped` positions belong to no token (OPT).
    """

    positions: int = 0
    segments: int = 0
    norm: NormSpec | None = None
    padding: int | None = None
    skipped: int = 0

    def tensors(self, hidden: int) -> Iterator[TensorSpec]:
        """Yield the tensors of the entry."""
        for role, count in (("positions", self.positions), ("segments", self.segments)):
            if count:
                yield TensorSpec(Key(role), (count * hidden,))
        if self.norm:
            yield from self.norm.tensors("embed_norm", -1, hidden)

    def apply(self, rank: Rank, page: Page, x: Floats, batch: Batch) -> None:
        """Do it to the rows x [m, hidden] of a batch; the page has its tensors."""
        if self.segments:
            segments = page.vector("segments").reshape(self.segments, -1)
            second = batch.second if self.segments > 1 else None
            x += segments[0] if second is None else segments[second.astype(np.int32)]
        if self.positions:
            x += page.vector("positions").reshape(self.positions, -1)[self._places(batch)]
        if self.norm:
            x[:] = rank.normalise(x, self.norm.kernel(page, "embed_norm"))

    def _places(self, batch: Batch) -> Ints:
        """Return the numbers of the rows' positions."""
        if self.padding is None:
            positions: Ints = batch.positions + np.int32(self.skipped)
            return positions
        counted = batch.tokens != self.padding
        total = np.cumsum(counted, dtype=np.int32)
        before = (total - counted)[batch.first_rows]  # the count in the sequences before
        of_row = np.repeat(before, np.diff(batch.first_rows, append=np.int32(len(total))))
        places: Ints = np.where(counted, total - of_row, np.int32(0)) + np.int32(self.padding)
        return places
