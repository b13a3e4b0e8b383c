"""The rows of one step, and how layers see them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpillm.model.kv import GroupTables, StateMoves
from mpillm.model.rope import RopeConfig, cos_sin

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Rows = tuple[Floats | None, Floats | None, Ints, Ints, Ints, Ints, Ints]
Turn = tuple[RopeConfig, int]  # RoPE, and the number of dimensions of each head that it rotates
NO_IDS = np.empty(0, np.int32)
NO_MOVES = StateMoves()
NO_ADAPTER = 0  # the number of the model without an adapter; adapters are numbered from 1 on
NO_TABLES = GroupTables(NO_IDS, NO_IDS, NO_IDS)


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step, as arrays of length m; those of a sequence are neighbours."""

    tokens: Ints
    positions: Ints
    offset: Ints  # the place of the row's keys and values in their block
    groups: tuple[GroupTables, ...]  # the tables of each group of layers
    first_rows: Ints  # the first row of each sequence
    slots: Ints  # the slot of each sequence's states; -1: none
    states: StateMoves = NO_MOVES
    # Whether a row belongs to its sequence's second segment; None if no row does.
    second: NDArray[np.bool_] | None = None
    adapters: Ints | None = None  # the number of each row's; None if no row has one
    long: NDArray[np.bool_] | None = None  # whether the row is of a long sequence (LongRoPE); None: no row is


class ForwardPass:
    """A batch while it passes through the layers; what several layers need of it is made once."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self._angles: dict[Turn, tuple[Floats, Floats]] = {}
        self._rows: dict[tuple[Turn | None, int | None], Rows] = {}

    def rows(self, turn: Turn | None, group: int | None) -> Rows:
        """Cosines and sines [m, dim / 2] of the rows' positions, and where their keys and values are in a group."""
        found = self._rows.get((turn, group))
        if found is None:
            batch, (cos, sin) = self.batch, self._cos_sin(turn)
            tables = NO_TABLES if group is None else batch.groups[group]
            where = tables.block, batch.offset, batch.positions, tables.table, tables.table_start
            found = self._rows[turn, group] = cos, sin, *where
        return found

    def _cos_sin(self, turn: Turn | None) -> tuple[Floats | None, Floats | None]:
        if turn is None:
            return None, None
        if turn not in self._angles:
            self._angles[turn] = cos_sin(*turn, self.batch.positions, self.batch.long)
        return self._angles[turn]
