"""Matrices that a file stores head by head within another matrix, and vectors that it stores head by head.

DeepSeek's `kv_b_proj` [heads * (part + value), latent] expands a latent to each head's keys and values.
`kernels.LatentAttention` takes it as two matrices, as newer files of llama.cpp store them: k_b [heads * latent, part],
which is the transpose of the first `part` rows of each head, and v_b [heads * value, latent], which has the other rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpillm.errors import ModelError
from mpillm.weights.formats.extent import Extent, Lies
from mpillm.weights.formats.gguf_family import GgufFamily
from mpillm.weights.formats.stored import OWN, Bytes
from mpillm.weights.names import RowGroups
from mpillm.weights.roles import Key


@dataclass(frozen=True)
class HeadPart(Extent):
    """The rows `first` .. `first + count` of every head, in a `whole` matrix whose heads have `each` rows.

    `transposed`: each head's matrix is transposed, which needs its values, for blocks lie along rows.
    """

    whole: Extent = field(kw_only=True)
    each: int = field(kw_only=True)
    first: int = field(kw_only=True)
    count: int = field(kw_only=True)
    transposed: bool = field(kw_only=True)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.n // self._height * self.count * self.whole.row_bytes

    def lies(self) -> Iterator[Lies]:
        return self.whole.lies()

    def rows(self, rows: range) -> Bytes:
        heads, whole = self._heads(rows), self.whole
        raw = whole.rows(self._of_whole(heads)).reshape(len(heads), self.each, -1)
        own = np.ascontiguousarray(raw[:, self.first : self.first + self.count]).reshape(-1, raw.shape[2])
        begin = heads.start * self._height
        if not self.transposed:
            return own[rows.start - begin : rows.stop - begin]
        if whole.stored.block > 1:
            own = whole.stored.decode(own, whole.k, threads=1).view(np.uint8)
        values = own.view(f"u{self.stored.block_bytes}").reshape(len(heads), self.count, whole.k)
        transposed = values.swapaxes(1, 2).reshape(-1, self.count)[rows.start - begin : rows.stop - begin]
        return np.ascontiguousarray(transposed).view(np.uint8)

    def rows_together(self, rows: range) -> Bytes:
        return self.rows(rows)

    def release(self, rows: range | None = None) -> None:
        self.whole.release(self._of_whole(self._heads(range(self.n) if rows is None else rows)))

    def at(self, first: int) -> None:
        return None

    @property
    def _height(self) -> int:
        """Rows of a head's matrix."""
        return self.whole.k if self.transposed else self.count

    def _heads(self, rows: range) -> range:
        """Return the heads that have some of these rows."""
        return range(rows.start // self._height, -(-rows.stop // self._height))

    def _of_whole(self, heads: range) -> range:
        return range(heads.start * self.each, heads.stop * self.each)


def split_kv_b(extents: dict[Key, Extent], config: Mapping[str, Any], path: Path) -> None:
    """Put k_b and v_b in the place of each kv_b, in which they lie head by head; ModelError if they do not."""
    for key in [key for key in extents if key.role == "kv_b"]:
        whole = extents.pop(key)
        if Key("k_b", key.layer) in extents:  # some files have both
            continue
        sizes = [config.get(name) for name in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim")]
        heads, part, value = (size if type(size) is int and size > 0 else 1 for size in sizes)
        each = part + value
        if whole.shape[0] != heads * each:
            raise ModelError(
                f"{path}: tensor {whole.name} has {whole.shape[0]} rows, but {heads} heads of {part} + {value} have "
                f"{heads * each}."
            )
        for role, first, count, transposed in (("k_b", 0, part, True), ("v_b", part, value, False)):
            shape = (heads * whole.k, part) if transposed else (heads * value, whole.k)
            stored = OWN["F32"] if transposed and whole.stored.block > 1 else whole.stored
            extents[Key(role, key.layer)] = HeadPart(
                whole.file, whole.name, whole.offset, shape, stored,
                whole=whole, each=each, first=first, count=count, transposed=transposed,
            )  # fmt: skip


@dataclass(frozen=True)
class JoinedHeads(Extent):
    """A vector whose parts are tensors of their own, one for each head."""

    parts: tuple[Extent, ...] = field(kw_only=True)

    def lies(self) -> Iterator[Lies]:
        for part in self.parts:
            yield from part.lies()

    def vector(self) -> Bytes:
        return np.concatenate([part.vector() for part in self.parts], axis=1)

    def release(self, rows: range | None = None) -> None:
        for part in self.parts:
            part.release()

    def at(self, first: int) -> None:
        return None


def join_heads(extents: dict[Key, Extent], path: Path) -> None:
    """Make one vector of the norms of a layer's heads (StableLM 2 12B); ModelError if they do not go together."""
    heads: dict[Key, dict[int, Extent]] = {}
    for key in [key for key in extents if key.role in ("q_norm", "k_norm") and key.expert >= 0]:
        heads.setdefault(key._replace(expert=-1), {})[key.expert] = extents.pop(key)
    for key, found in heads.items():
        parts = tuple(found[head] for head in sorted(found))
        first = parts[0]
        if len(parts) <= max(found) or any((p.shape, p.stored) != (first.shape, first.stored) for p in parts):
            raise ModelError(f"{path}: the norms of heads beside {first.name} are not complete or not alike.")
        shape = (len(parts) * first.k,)
        extents[key] = JoinedHeads(first.file, first.name, first.offset, shape, first.stored, parts=parts)


def row_groups(config: dict[str, Any], family: GgufFamily) -> RowGroups:
    """Return the division of tensors that hold several matrices."""
    return {**_attention_rows(config), **family.row_groups(config)}


def _attention_rows(config: dict[str, Any]) -> RowGroups:
    """Return the rows of q, k and v, which some families have in one tensor; nothing if the configuration is silent."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if type(heads) is not int or type(hidden) is not int or heads < 1:
        return {}
    kv_heads, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads
    rows = heads * head_dim, kv_heads * head_dim, kv_heads * head_dim
    return {("q", "k", "v"): rows, ("q_bias", "k_bias", "v_bias"): rows}
