"""The matrices and vectors that a tensor of a file holds: one, several side by side, or those of all experts."""

from __future__ import annotations

import math

from mpillm.errors import ModelError
from mpillm.weights.formats.extent import Extent, Interleaved, Made
from mpillm.weights.names import Parsed, RowGroups
from mpillm.weights.roles import ROLES, Key


def add(extents: dict[Key, Extent], parsed: Parsed, extent: Extent, groups: RowGroups | None = None) -> None:
    """Add the matrices of a tensor to `extents`; ModelError if one of them is there already.

    `groups` tells how tensors that hold several matrices are taken apart, where these are not equal parts.
    """
    for key, piece in place(parsed, extent, extent.shape, groups or {}):
        if key in extents:
            raise ModelError(
                f"{extent.file.path}: tensors {extents[key].name} and {extent.name} are the same weights."
            )
        extents[key] = piece


def place(
    parsed: Parsed, extent: Extent, shape: tuple[int, ...], groups: RowGroups
) -> list[tuple[Key, Extent]]:
    """Take a tensor of a file apart into the matrices and vectors it holds.

    `shape` is the tensor's whole shape, outermost dimension first; `extent` is where it begins, or a `Made` of it all;
    `groups`: see `add`.
    """
    role = ROLES[parsed.roles[0]]
    if role.by_heads and len(shape) == 3:
        shape = shape[0] * shape[1], shape[2]
    ndim = role.ndim + parsed.stacked
    if role.flat:
        shape = (*shape[:1], math.prod(shape[1:]))
    if role.one_row:
        row = shape[1:] if len(shape) == 2 and shape[0] == 1 else shape
        shape = row if ndim == 1 else (1, *row)
    if len(shape) != ndim + role.flat:
        raise ModelError(
            f"{extent.file.path}: tensor {extent.name} has shape {list(shape)}, but must have {ndim} dimensions."
        )
    if 0 in shape or not extent.stored.fits(shape[-1]):
        raise ModelError(
            f"{extent.file.path}: tensor {extent.name} has shape {list(shape)}, whose rows are not whole blocks of "
            f"{extent.stored.name}."
        )
    experts = range(shape[0]) if parsed.stacked else (parsed.expert,)
    rows, *width = shape[1:] if parsed.stacked else shape
    runs, count = _runs_of(parsed, extent, rows, groups)
    row_bytes = extent.stored.row_bytes(width[0] if width else 1)
    found: list[tuple[Key, Extent]] = []
    for index, expert in enumerate(experts):
        for number, (name, run) in enumerate(zip(parsed.roles, runs, strict=True)):
            part = (run * count * width[0],) if role.flat else (run * count, *width)
            if isinstance(extent, Made):
                alternate = (1, len(runs)) if parsed.in_turn else (run, sum(runs)) if count > 1 else (0, 0)
                first = number if parsed.in_turn else sum(runs[:number])
                piece: Extent = extent.piece(expert if parsed.stacked else None, part, first, *alternate)
            else:
                offset = extent.offset + (index * rows + sum(runs[:number])) * row_bytes
                piece = Extent(extent.file, extent.name, offset, part, extent.stored, extent.rope_heads)
                if count > 1 and len(runs) > 1:
                    piece = Interleaved(
                        extent.file, extent.name, offset, part, extent.stored, run=run, period=sum(runs)
                    )
            found.append((Key(name, parsed.layer, expert), piece))
    return found


def _runs_of(parsed: Parsed, extent: Extent, rows: int, groups: RowGroups) -> tuple[tuple[int, ...], int]:
    """Return the rows of each matrix in a group of a tensor's rows, and how many groups there are."""
    parts, known = len(parsed.roles), groups.get(parsed.roles)
    if known:
        if rows % sum(known):
            raise ModelError(
                f"{extent.file.path}: tensor {extent.name} has {rows} rows, but its {parts} parts have {sum(known)}."
            )
        return known, rows // sum(known)
    if rows % parts:
        raise ModelError(
            f"{extent.file.path}: tensor {extent.name} has {rows} rows, which are not {parts} equal parts."
        )
    return (rows // parts,) * parts, 1
